"""From an evaluation's counts to pass rates: a verification that failed says nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from rl.data_columns import Row, parse_record
from rl.pass_rates import pass_rate_summary, rated_record

ROW = Row("7", "P", "1", "set.jsonl", columns={"level": 3, "pass_rate": 0.9})


@pytest.mark.parametrize(
    ("correct", "failures", "rate", "samples"), [(0, 0, 0.0, 8), (2, 0, 0.25, 8), (3, 2, 0.5, 6), (0, 8, None, 0)]
)
def test_failed_verifications_do_not_count(correct: int, failures: int, rate: float | None, samples: int) -> None:
    measured = {"id": "7", "correct": correct, "samples": 8, "verifier_failures": failures}
    assert rated_record(ROW, measured) == {
        "level": 3,
        "id": "7",
        "problem": "P",
        "answer": "1",
        "pass_rate": rate,
        "pass_rate_samples": samples,
    }


def test_a_chat_is_written_as_one() -> None:
    row = Row("7", "P", "1", "set.jsonl", (("system", "S"), ("user", "P ")))
    record = rated_record(row, {"id": "7", "correct": 1, "samples": 2, "verifier_failures": 0})
    assert parse_record(record, "set.jsonl", 1) == replace(row, pass_rate=0.5)


def test_summary() -> None:
    records = [{"pass_rate": rate} for rate in (0.0, 0.0, 0.5, 1.0, None)]
    assert pass_rate_summary(records, Path("rated.jsonl")) == (
        "5 problems in rated.jsonl: 2 never solved, 1 sometimes, 1 always, 1 not measurable"
    )
