"""Repeated problems and contamination: what is found, what is not, by hand and against the plain way to compute it."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.data_columns import Row, comparable_answer
from rl.duplicates import (
    NEAR_SIMILARITY,
    NEAR_WINDOW,
    contamination_report,
    find_contamination,
    find_duplicates,
    window_length,
)
from rl.problem_text import numbers, windows, words
from rl.problems import DIFFICULTIES, FAMILIES, generate

LONG = (
    "Every morning Aya goes for a $9$-kilometer-long walk and stops at a coffee shop afterwards. When she walks at a "
    "constant speed of $s$ kilometers per hour, the walk takes her $4$ hours, including $t$ minutes spent in the shop."
)
SHORT = "Find the remainder when 7*3+5 is divided by 4."


def _rows(*problems: str, answer: str = "1", source: str = "train") -> list[Row]:
    return [Row(str(number), problem, answer, source) for number, problem in enumerate(problems)]


def test_exact_duplicates_are_those_of_the_same_words() -> None:
    rows = _rows(SHORT, LONG, SHORT.replace("7*3+5", "$7 \\cdot 3 + 5$"), SHORT.replace("7", "8"), LONG.upper())
    assert find_duplicates(rows, near=False) == {2: 0, 4: 1}


def test_near_duplicates_have_the_same_numbers_and_answer() -> None:
    typo = LONG.replace("afterwards", "after that")
    assert find_duplicates(_rows(LONG, typo), near=False) == {}
    assert find_duplicates(_rows(LONG, typo), near=True) == {1: 0}
    assert find_duplicates(_rows(LONG, typo.replace("9", "8")), near=True) == {}
    assert find_duplicates([*_rows(LONG), *_rows(typo, answer="2")], near=True) == {}
    assert find_duplicates([*_rows(LONG, answer="073"), *_rows(typo, answer="$73$")], near=True) == {1: 0}


def test_four_fifths_of_the_windows_must_be_common() -> None:
    """10 words make 8 windows. A change of the last word leaves 7 common of 9, of the word before too, 6 of 10."""
    nine = "alpha beta gamma delta epsilon zeta eta theta iota"
    assert find_duplicates(_rows(f"{nine} kappa", f"{nine} lambda"), near=True) == {}
    assert find_duplicates(_rows(f"{nine} nu xi kappa", f"{nine} nu xi lambda"), near=True) == {1: 0}


def test_the_first_of_a_chain_stays() -> None:
    """The third is like the second, but not like the first, which is what stays."""
    steps = [
        LONG,
        LONG.replace("morning", "evening"),
        LONG.replace("morning", "evening").replace("spent in", "lost at"),
    ]
    found = find_duplicates(_rows(*steps), near=True)
    assert found.pop(1) == 0 and set(found.values()) <= {0}


def _plain_duplicates(rows: list[Row]) -> set[int]:
    kept: list[Row] = []
    repeats = set()
    for number, row in enumerate(rows):
        if any(_same(row, other) for other in kept):
            repeats.add(number)
        else:
            kept.append(row)
    return repeats


def _same(row: Row, other: Row) -> bool:
    mine, theirs = words(row.problem), words(other.problem)
    a, b = windows(mine, NEAR_WINDOW), windows(theirs, NEAR_WINDOW)
    near = numbers(mine) == numbers(theirs) and comparable_answer(row.answer) == comparable_answer(other.answer)
    return mine == theirs or (near and len(a & b) / len(a | b) >= NEAR_SIMILARITY)


@given(st.lists(st.lists(st.sampled_from("abc1"), min_size=1, max_size=14), max_size=12), st.randoms())
def test_nothing_is_missed(problems: list[list[str]], rng: random.Random) -> None:
    rows = _rows(*(" ".join(problem) for problem in problems))
    # Exact repeats are found first, whoever else is near; comparing all with all does both at once.
    distinct = [row for number, row in enumerate(rows) if number not in find_duplicates(rows, near=False)]
    assert set(find_duplicates(distinct, near=True)) == _plain_duplicates(distinct)


@pytest.mark.parametrize(("num_words", "length"), [(5, None), (6, 3), (11, 3), (12, 6), (25, 6), (26, 13), (200, 13)])
def test_window_length(num_words: int, length: int | None) -> None:
    assert window_length(num_words) == length


def _shares(train: str, held_out: str) -> list[float]:
    return [hit.share for hit in find_contamination(_rows(train), _rows(held_out, source="eval"))]


def test_a_problem_inside_another_is_found_however_typeset() -> None:
    wrapped = f"Solve step by step. {LONG.replace('$', '').upper()} Answer with 1 number."
    assert _shares(wrapped, LONG) == [1.0]
    assert _shares(SHORT.replace("*", "\\times "), SHORT) == [1.0]


def test_half_of_the_windows_is_enough() -> None:
    """14 words make 9 windows of 6. One changed word in 6th or 9th place leaves 3 or 4 of them, in 11th 5."""
    held_out = [f"w{chr(97 + place)}" for place in range(14)]
    for changed, expected in ((5, []), (8, []), (10, [5 / 9])):
        train = [*held_out[:changed], "other", *held_out[changed + 1 :]]
        assert _shares(" ".join(train), " ".join(held_out)) == expected


def test_other_numbers_are_another_problem() -> None:
    assert _shares(LONG.replace("4", "5"), LONG) == []
    assert _shares(SHORT.replace("4", "9"), SHORT) == []
    assert _shares(f"{SHORT} Also 4.", SHORT) == [1.0]


def test_few_words_must_be_the_whole_problem() -> None:
    assert _shares("What is 2+3 times 7?", "2+3") == []
    assert _shares("$2+3$", "2+3") == [1.0]


PHRASE = "is $\\frac{m}{n}$, where $m$ and $n$ are relatively prime positive integers. Find $m+n$."
CONTEST = [f"The {what} {PHRASE}" for what in ("chance of a six", "ratio of the sides", "area of the square")]


def test_phrases_of_the_trade_do_not_count() -> None:
    """17 of 22 words here, 12 of 17 windows of 6. Where only two problems have them, they may well be the problem."""
    train = f"Our expected number of socks {PHRASE}"
    assert list(find_contamination(_rows(train), _rows(*CONTEST))) == []
    assert [hit.share for hit in find_contamination(_rows(train), _rows(*CONTEST[:2]))] == [12 / 17, 12 / 17]


def test_without_its_phrases_a_problem_is_found_all_the_same() -> None:
    train = [f"Question: {problem}" for problem in CONTEST]
    assert [hit.share for hit in find_contamination(_rows(*train), _rows(*CONTEST))] == [1.0, 1.0, 1.0]


def test_a_held_out_problem_that_is_there_three_times_is_looked_for_once() -> None:
    hits = list(find_contamination(_rows(f"Look: {LONG}"), _rows(LONG, LONG, LONG)))
    assert [(hit.held_out.id, hit.share) for hit in hits] == [("0", 1.0)]


def test_every_pair_is_found_in_order() -> None:
    train, held_out = _rows(SHORT, "other", LONG, SHORT), _rows(LONG, SHORT, source="eval")
    pairs = [(hit.train.id, hit.held_out.id) for hit in find_contamination(train, held_out)]
    assert pairs == [("0", "1"), ("2", "0"), ("3", "1")]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_synthetic_training_problems_contain_no_synthetic_evaluation_problem(difficulty: int) -> None:
    """Their hash keeps them apart; neither are they so alike that the default of a recipe would warn."""
    train, held_out = (
        [Row(each.id, each.problem, each.answer, split) for each in generate(split, size, 0, difficulty, FAMILIES)]
        for split, size in (("train", 800), ("eval", 200))
    )
    assert list(find_contamination(train, held_out)) == []
    assert find_duplicates(train, near=True) == {}


def test_report_counts_problems_and_shows_the_first() -> None:
    train, held_out = _rows(SHORT, SHORT, LONG), _rows(LONG, SHORT, source="eval")
    report = contamination_report(list(find_contamination(train, held_out)), shown=2)
    first, *shown, more = report.splitlines()
    assert first == "3 training problems hold 2 of the evaluation problems"
    assert shown[0] == f"  train:0 holds 100% of eval:1: {SHORT!r}" and len(shown) == 2
    assert more == "  and 1 more"


@pytest.mark.slow
def test_a_hundred_thousand_problems_take_less_than_a_minute() -> None:
    """A third repeats another, a third has other numbers, a third shares nothing but words."""
    rng = random.Random(0)
    vocabulary = [f"word{number}" for number in range(3000)]
    originals = [" ".join(rng.choices(vocabulary, k=50)) + f" {rng.randrange(50)} and 7" for _ in range(34_000)]
    others = [re.sub("[0-9]+$", str(rng.randrange(10, 99)), rng.choice(originals)) for _ in range(33_000)]
    rows = _rows(*originals, *(rng.choice(originals).upper() for _ in range(33_000)), *others)
    assert len(find_duplicates(rows, near=True)) >= 33_000
    assert len(list(find_contamination(rows, _rows(*originals[:500], source="eval")))) >= 500
