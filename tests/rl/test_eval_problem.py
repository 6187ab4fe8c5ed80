"""One problem of an evaluation: who votes, which answers are one, and what its row says."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.result import Reason
from rl.data_columns import Row
from rl.eval_problem import Graded, ProblemResult, majority, normal_form
from tests.rl.graded import graded, problem


def test_the_answer_given_most_often_wins() -> None:
    votes = (graded("1"), graded("2", correct=True), graded("3"), graded("2", correct=True))
    assert majority(votes) == votes[1]


def test_a_tie_goes_to_the_answer_given_first() -> None:
    first, second = graded("1"), graded("2", correct=True)
    assert majority((first, second, second, first)) == first
    assert majority((second, first, first, second)) == second


def test_truncated_completions_and_those_without_an_answer_do_not_vote() -> None:
    cut = graded("2", correct=True, finish_reason="length")
    assert majority((cut, cut, graded(None), graded(None), graded(None), graded("1"))) == graded("1")
    assert majority((cut, graded(None))) is None
    assert majority(()) is None


def test_spellings_of_one_number_are_one_vote() -> None:
    winner = majority((graded("9"), graded("073"), graded("9"), graded("$73$"), graded(" 73.")))
    assert winner is not None and normal_form(winner.extracted or "") == "73"


def test_equal_answers_are_right_if_one_was_found_right() -> None:
    """The verifier may have failed on one of them."""
    right = graded("0.5", correct=True)
    assert majority((graded("1/2"), graded("\\frac12"), right)) == right


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("7", "7"),
        ("007", "7"),
        ("000", "0"),
        ("-0", "0"),
        ("-07", "-7"),
        ("+7", "7"),
        ("7.", "7"),
        ("$7$", "7"),
        ("1,234", "1234"),
        ("12,345,678", "12345678"),
        ("1{,}234", "1234"),
        ("(1,234)", "1234"),
        ("(1,23)", "(1,23)"),
        ("7.0", "7"),
        ("\\frac{1}{2}", "1/2"),
        ("\\dfrac12", "1/2"),
        ("1 / 2", "1/2"),
        ("0.5", "1/2"),
        ("6/3", "6/3"),
        ("2 + 3", "2+3"),
        ("x = 5", "5"),
        ("1011_2", "1011_2"),
        ("\\left( x , y \\right)", "(x,y)"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_normal_forms(answer: str, form: str) -> None:
    assert normal_form(answer) == form


@given(st.integers(-(10**6), 10**6), st.integers(0, 3))
def test_every_spelling_of_an_integer_is_its_digits(value: int, zeros: int) -> None:
    sign = "-" if value < 0 else ""
    assert normal_form(f"${value:,}$") == normal_form(f" {sign}{'0' * zeros}{abs(value)} ") == str(value)


@given(st.text("0123456789.,-/^_()= ab"))
def test_dollar_signs_and_spaces_around_an_answer_do_not_count(answer: str) -> None:
    assert normal_form(f" ${answer}$ ") == normal_form(answer)


@given(st.text(st.characters()))
def test_whatever_a_policy_writes_has_a_normal_form(answer: str) -> None:
    assert isinstance(normal_form(answer), str)


def test_the_row_of_a_problem_by_hand() -> None:
    found = problem(
        4,
        graded("3", correct=True, length=10),
        graded("5", length=20, finish_reason="length"),
        graded(None, length=30),
        Graded("x", "2", False, Reason.TIMEOUT, 60, "stop"),
        answer="3",
    ).summary()
    assert found == {
        "id": "row-4",
        "source": "sums.jsonl",
        "answer": "3",
        "correct": 1,
        "samples": 4,
        "majority": "3",
        "majority_correct": True,
        "mean_length": 30.0,
        "truncated": 1,
        "no_answer": 1,
        "verifier_failures": 1,
    }


def test_nobody_voted() -> None:
    found = problem(0, graded(None)).summary()
    assert found["majority"] is None and found["majority_correct"] is False


@given(st.text(st.characters()))
def test_a_problem_survives_json(text: str) -> None:
    """Whatever a policy writes: null characters, halves of surrogate pairs, line separators."""
    first = problem(2, graded(text, correct=True, text=text), graded(None, finish_reason="length"))
    assert ProblemResult.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_a_chat_survives_json() -> None:
    first = replace(problem(2), row=Row("2", "Q", "3", "chats.jsonl", (("system", "S"), ("user", "Q"))))
    assert ProblemResult.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_texts_can_be_dropped_without_changing_the_row() -> None:
    first = problem(0, graded("3", text="long"), graded("4", text="longer"))
    assert [each.text for each in first.without_texts().completions] == ["", ""]
    assert first.without_texts().summary() == first.summary()
