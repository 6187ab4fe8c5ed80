"""The table of verdicts, held against our verifier and against math-verify alone."""

import logging

import pytest
from math_verify import LatexExtractionConfig, parse, verify

from reward.config import RewardConfig
from reward.pool import RewardPool

from .cases import CASES, REASONS, Row


def math_verify_score(completion: str, gold: str) -> float:
    """Its verdict on the boxed answer, without limits."""
    return float(verify(_parse(f"\\boxed{{{gold}}}"), _parse(completion), timeout_seconds=0))


def _parse(text: str) -> list[object]:
    config = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)
    parsed: list[object] = parse(
        text, [config], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=0
    )
    return parsed


def test_the_table_is_large_and_has_no_row_twice() -> None:
    assert len(CASES) >= 400
    assert len({row[:2] for row in CASES}) == len(CASES)
    assert min(sum(row[2] == score for row in CASES) for score in (0, 1)) >= 200


def test_every_score_is_as_expected_and_none_is_a_failure() -> None:
    with RewardPool(RewardConfig(timeout_seconds=60.0)) as pool:
        results = pool.score([(row[0], row[1]) for row in CASES])
    assert [(row, result.reason) for row, result in zip(CASES, results, strict=True) if result.score != row[2]] == []
    assert [(row, result.reason) for row, result in zip(CASES, results, strict=True) if result.is_failure] == []


@pytest.fixture
def _quiet() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off


@pytest.mark.slow
@pytest.mark.usefixtures("_quiet")
def test_math_verify_differs_exactly_where_a_reason_is_given() -> None:
    def differs(row: Row) -> bool:
        return math_verify_score(row[0], row[1]) != row[2]

    assert [row for row in CASES if differs(row) != (len(row) == 4)] == []


def test_every_reason_is_given_and_used() -> None:
    assert {row[3] for row in CASES if len(row) == 4} == set(REASONS)
