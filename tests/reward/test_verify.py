"""Which method decides, with which reason and which form of the gold answer; properties; hostile text.

The verdicts themselves are in `cases.py`.
"""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.extract import BOXED
from reward.result import FAILURES, Method, Reason, RewardResult
from reward.verify import MAX_ANSWER_CHARS, MAX_DEPTH, MAX_SYMBOLIC_CHARS, verify_fast

# Answer, gold, and what decides: reason, method, the gold answer as it was compared.
DECIDED = [
    ("073", "$73$", "correct", "integer", "73"),
    ("74", "073", "wrong", "integer", "73"),
    ("9" * 5000, "9" * 5000, "correct", "integer", "9" * 5000),
    ("9" * 5000, "9" * 5001, "wrong", "integer", "9" * 5001),
    ("73\\text{ apples}", "073", "correct", "number", "73"),
    ("0.5", "\\dfrac{2}{4}", "correct", "number", "1/2"),
    ("50\\%", "x = 50\\%", "correct", "number", "50%"),
    ("5", "5\\text{ centimeters}", "correct", "number", "5 cm"),
    ("101", "101_2", "correct", "number", "101_2"),
    ("2+3", "5", "wrong_form", "number", "5"),
    ("\\frac{146}{2}", "73", "wrong_form", "number", "73"),
    ("\\frac{147}{3}", "73", "wrong", "number", "73"),
    ("10^{10^{10}}", "73", "wrong_form", "number", "73"),
    (")(", "73", "wrong_form", "number", "73"),
    ("(C) 12", "\\text{C}", "correct", "choice", "C"),
    ("D", "(C)", "wrong", "choice", "C"),
    ("\\text{the Ellipse.}", "an ellipse", "correct", "text", "ellipse"),
    ("\\emptyset", "\\text{none}", "wrong", "text", "none"),
    ("\\dfrac{x}{2}", "\\frac x2", "correct", "identical", "\\frac{x}{2}"),
    ("1 2", "1 2", "correct", "identical", "1 2"),
    ("\\int x", "x^2", "wrong_form", "symbolic", "x^2"),
    ("73\x00", "73", "unparsable_answer", "none", "73"),
    (".", "73", "unparsable_answer", "none", "73"),
    ("x" * (MAX_ANSWER_CHARS + 1), "x", "unparsable_answer", "none", "x"),
    ("x" * (MAX_SYMBOLIC_CHARS + 1), "x", "unparsable_answer", "none", "x"),
    ("(" * MAX_DEPTH + "(x+1)" + ")" * MAX_DEPTH, "x", "unparsable_answer", "none", "x"),
    ("73", " ", "bad_gold", "none", " "),
]


@pytest.mark.parametrize(("answer", "gold", "reason", "method", "form"), DECIDED, ids=range(len(DECIDED)))
def test_decided(answer: str, gold: str, reason: str, method: str, form: str) -> None:
    result = verify_fast(f"\\boxed{{{answer}}}", gold, BOXED)
    assert result is not None
    assert (result.reason, result.method, result.gold, result.extracted) == (reason, method, form, answer)
    assert result.score == float(reason == "correct")
    assert result.milliseconds > 0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("x+1", "1+x"),
        ("5", "\\sqrt{25}"),
        ("(1, 2)", "1, 2"),
        ("+x" * (MAX_SYMBOLIC_CHARS // 2 + 1), "+x" * (MAX_SYMBOLIC_CHARS // 2)),
        ("(" * 20 + "x" + ")" * 20, "(" * 20 + "y" + ")" * 20),
    ],
)
def test_the_rest_takes_symbolic_algebra(answer: str, gold: str) -> None:
    assert verify_fast(f"\\boxed{{{answer}}}", gold, BOXED) is None


def test_no_answer() -> None:
    result = verify_fast("it is a half", "\\frac12", BOXED)
    assert result is not None
    assert (result.score, result.reason, result.extracted) == (0.0, "no_answer", None)


def test_another_marker_is_honoured() -> None:
    result = verify_fast("\\boxed{72}\n**Answer: $\\boxed{73}$**", "73", "Answer:")
    assert result is not None
    assert (result.extracted, result.reason) == ("$\\boxed{73}$**", "wrong_form")
    result = verify_fast("\\boxed{72}\nAnswer: $\\boxed{73}$.", "73", "Answer:")
    assert result is not None
    assert (result.extracted, result.reason) == ("$\\boxed{73}$.", "correct")


@given(st.integers(), st.sampled_from([-1, 0, 0, 1, 10]))
def test_integers_of_any_size_agree_with_python(gold: int, error: int) -> None:
    answer = gold + error
    for written in (f"{answer}", f"{answer:,}", f"{answer:+d}", f"{answer:08d}"):
        for right in (f"{gold}", f"{gold:,}", f"{gold:03d}"):
            result = verify_fast(f"\\boxed{{{written}}}", right, BOXED)
            assert result is not None
            assert result.score == float(error == 0)


@given(st.fractions(max_denominator=10**6), st.sampled_from([Fraction(0), Fraction(0), Fraction(1, 7), Fraction(-2)]))
def test_fractions_agree_with_python(gold: Fraction, error: Fraction) -> None:
    answer = gold + error
    sign, top = ("-" if answer < 0 else ""), abs(answer.numerator)
    whole, rest = divmod(top, answer.denominator)
    forms = [f"{sign}\\frac{{{top}}}{{{answer.denominator}}}", f"{answer.numerator}/{answer.denominator}"]
    if whole and rest:
        forms.append(f"{sign}{whole}\\frac{{{rest}}}{{{answer.denominator}}}")
    for form in forms if answer.denominator > 1 else [str(answer.numerator)]:
        result = verify_fast(f"\\boxed{{{form}}}", f"{gold.numerator}/{gold.denominator}", BOXED)
        assert result is not None
        assert result.score == float(error == 0), form


PIECES = st.sampled_from(
    [*"0123456789.,+-*/^_={}()[]%!|\\ $abcxyz\u200b\ud800\x00\u2212", "\\frac", "\\text{", "\\sqrt"]
)
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join))


@given(TEXTS, st.sampled_from(["73", "\\frac12", "C", "\\text{even}", "x^2+1", "50\\%", "5\\text{ cm}"]) | TEXTS)
def test_any_text_gets_a_verdict_or_goes_on(answer: str, gold: str) -> None:
    result = verify_fast(f"\\boxed{{{answer}}}", gold, BOXED)
    assert result is None or result.score == float(result.reason == "correct")


@given(TEXTS)
def test_an_answer_with_the_golds_own_text_is_right(gold: str) -> None:
    result = verify_fast(f"Answer: {gold}", gold.partition("\n")[0], "Answer: ")
    if result is not None and result.extracted is not None and "Answer: " not in gold:
        assert result.reason in ("correct", "bad_gold")


MEGA = 1_000_000


@pytest.mark.parametrize("gold", ["73", "C", "x^2"])
@pytest.mark.parametrize(
    "text", ["9", "{", "}", "(", "\\", "=", " ", "\\frac", "\\text{", "\\$", "5 ", "1,", "x=", "^{"]
)
def test_megabytes_take_linear_time(text: str, gold: str) -> None:
    start = time.process_time()
    for length in (MAX_ANSWER_CHARS, MEGA):
        verify_fast("\\boxed{" + text * (length // len(text)) + "}", gold, BOXED)
        verify_fast("#### " + text * (length // len(text)), gold, "####")
    assert time.process_time() - start < 3.0  # a quadratic scan of a megabyte would take hours


@pytest.mark.parametrize("reason", Reason)
def test_only_correct_scores_and_only_failures_fail(reason: Reason) -> None:
    result = RewardResult.of(reason, "73", 1.0)
    assert result.score == float(reason == "correct")
    assert result.is_failure == (reason in FAILURES)
    assert (result.gold, result.method, result.message) == (None, Method.NONE, "")


def test_what_counts_as_a_failure() -> None:
    verdicts = {"correct", "wrong", "wrong_form", "no_answer", "unparsable_answer", "ok"}
    assert {str(reason) for reason in set(Reason) - FAILURES} == verdicts
