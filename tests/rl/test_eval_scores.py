"""avg@k, pass@k, cons@k, intervals, lengths and the paired test: by hand, and against brute force."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.eval_scores import bootstrap_interval, length_statistics, pass_at_k, pass_sizes, scores, sign_flip_p_value
from tests.rl.graded import graded, problem


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [(4, 1, 2, 0.5), (4, 0, 4, 0.0), (4, 1, 4, 1.0), (10, 3, 5, 1 - 21 / 252), (5, 3, 1, 0.6), (3, 3, 2, 1.0)],
)
def test_pass_at_k_by_hand(samples: int, correct: int, k: int, expected: float) -> None:
    """1 - C(samples - correct, k) / C(samples, k), as in C(3, 2) / C(4, 2) = 3 / 6."""
    assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.booleans(), min_size=1, max_size=10), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_completion(correct: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(correct)))
    subsets = list(combinations(correct, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("samples", "sizes"),
    [(1, []), (2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (12, [2, 4, 8, 12]), (64, [2, 4, 8, 16, 32, 64])],
)
def test_pass_is_reported_for_powers_of_two_and_all_samples(samples: int, sizes: list[int]) -> None:
    assert pass_sizes(samples) == sizes


def test_scores_by_hand() -> None:
    """Right: 1 of 4 (majority 9, wrong), 3 of 4 (majority right), 0 of 4 (nobody votes)."""
    problems = [
        problem(0, graded("3", correct=True), graded("9"), graded("9"), graded("1")),
        problem(1, graded("4", correct=True), graded("5"), graded("4", correct=True), graded("4", correct=True)),
        problem(2, graded(None), graded(None), graded(None), graded("7", finish_reason="length")),
    ]
    found = scores(problems, seed=0)
    assert found["avg@4"] == pytest.approx((1 / 4 + 3 / 4 + 0) / 3)
    assert found["pass@2"] == pytest.approx(((1 - 3 / 6) + 1 + 0) / 3)
    assert found["pass@4"] == pytest.approx(2 / 3)
    assert found["cons@4"] == pytest.approx(1 / 3)
    assert list(found) == ["avg@4", "pass@2", "pass@4", "cons@4", "ci95"]
    assert list(found["ci95"]) == ["avg@4", "pass@2", "pass@4", "cons@4"]


def test_interval_of_two_problems() -> None:
    """The mean of two draws from {0, 1} is 0 or 1 with chance 1/4 each, so both tails reach the ends."""
    assert bootstrap_interval(np.array([0.0, 1.0]), seed=0) == (0.0, 1.0)
    assert bootstrap_interval(np.array([0.25, 0.25, 0.25]), seed=0) == (0.25, 0.25)


def test_interval_of_many_problems_is_the_normal_one() -> None:
    """400 problems, half of them solved: standard error 0.5 / 20 = 0.025, so 0.5 -+ 1.96 * 0.025."""
    low, high = bootstrap_interval(np.repeat([0.0, 1.0], 200), seed=3)
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)


def test_interval_follows_its_seed_and_nothing_else() -> None:
    values = np.linspace(0, 1, 50)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_lengths_by_hand() -> None:
    """Lengths 10, 20 (right), 30, 40, 100 in order: the median is 30, the 90th percentile 40 + 0.6 * 60."""
    completions = [graded("1", length=length, correct=length < 30) for length in (100, 10, 40, 20, 30)]
    found = length_statistics([problem(0, *completions[:2]), problem(1, *completions[2:])])
    assert found["all"] == pytest.approx({"mean": 40.0, "p50": 30.0, "p90": 76.0, "max": 100})
    assert found["correct"] == pytest.approx({"mean": 15.0, "p50": 15.0, "p90": 19.0, "max": 20})
    assert found["incorrect"] == pytest.approx({"mean": 170 / 3, "p50": 40.0, "p90": 88.0, "max": 100})


def test_lengths_of_nothing_are_null() -> None:
    found = length_statistics([problem(0, graded("1", length=5))])
    assert found["correct"] is None and found["incorrect"] == {"mean": 5.0, "p50": 5.0, "p90": 5.0, "max": 5}


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [
        ([], 1.0),
        ([0, 0], 1.0),
        ([5], 1.0),  # +5 and -5 are as far from 0
        ([1, 1, 1, 0], 2 / 8),  # only +++ and --- reach 3
        ([3, 2, -1], 4 / 8),  # the sums are -6, -4, -2, 0, 0, 2, 4 and 6
        ([2] * 10, 2 / 1024),
    ],
)
def test_sign_flips_by_hand(differences: list[int], p_value: float) -> None:
    assert sign_flip_p_value(differences) == pytest.approx(p_value, abs=1e-12)


@given(st.lists(st.integers(-8, 8), max_size=10))
def test_sign_flips_against_enumeration(differences: list[int]) -> None:
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    expected = sum(abs(total) >= abs(sum(differences)) for total in sums) / len(sums)
    assert sign_flip_p_value(differences) == pytest.approx(expected, abs=1e-12)
    assert sign_flip_p_value([7 * d for d in differences]) == sign_flip_p_value(differences)


def test_sign_flips_of_many_problems_are_those_of_a_normal_sum() -> None:
    """400 differences of one unit, sum 40: two standard errors of 20, with a correction for the steps of 2."""
    differences = [1] * 220 + [-1] * 180
    assert sign_flip_p_value(differences) == pytest.approx(0.0512, abs=0.0005)  # 2 * (1 - Phi(39 / 20))
