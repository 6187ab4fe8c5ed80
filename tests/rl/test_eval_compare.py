"""The comparison of two policies: paired by problem, by hand, and refused where it would mean nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rl.eval_compare import compare, comparison_table, read_result
from rl.eval_problem import ProblemResult
from rl.evaluate import summarise
from rollout.request import SamplingParams
from tests.rl.graded import graded, problem


def result(*correct: int, samples: int = 4, temperature: float = 0.6, answer: str = "3") -> dict[str, Any]:
    """An evaluation with so many right completions of each problem."""
    problems = [
        problem(index, *(graded("1", correct=sample < count) for sample in range(samples)), answer=answer)
        for index, count in enumerate(correct)
    ]
    return summarised(problems, temperature)


def summarised(problems: list[ProblemResult], temperature: float = 0.6) -> dict[str, Any]:
    return summarise(problems, SamplingParams(96, temperature), seed=0)


def test_a_comparison_by_hand() -> None:
    """Differences 2, 1, 0 and -1 of 4 samples: sum 2, which 6 of the 8 choices of signs reach in size."""
    found = compare(result(0, 1, 2, 3), result(2, 2, 2, 2))
    assert found["difference"] == pytest.approx(2 / 16)
    assert (found["better"], found["equal"], found["worse"]) == (2, 1, 1)
    assert found["p_value"] == pytest.approx(6 / 8)
    assert found["ci95"][0] < 0 < 2 / 16 < found["ci95"][1]


def test_the_same_policy_twice() -> None:
    found = compare(result(0, 1, 2), result(0, 1, 2))
    assert (found["difference"], found["ci95"], found["p_value"], found["equal"]) == (0.0, (0.0, 0.0), 1.0, 3)


def test_a_policy_that_is_better_everywhere() -> None:
    found = compare(result(*[0] * 20), result(*[1] * 20))
    assert found["difference"] == 0.25 and found["ci95"] == (0.25, 0.25)
    assert found["p_value"] == pytest.approx(2 / 2**20)


def test_numbers_of_samples_may_differ() -> None:
    """1 of 2 and 3 of 6 are equal; 2 of 2 against 5 of 6 is a sixth less."""
    found = compare(result(1, 2, samples=2), result(3, 5, samples=6))
    assert found["difference"] == pytest.approx(-1 / 12)
    assert (found["better"], found["equal"], found["worse"]) == (0, 1, 1)


def test_problems_are_paired_by_id_whatever_their_order() -> None:
    backwards = [problem(index, graded("1", correct=index == 2)) for index in (2, 1, 0)]
    forwards = [problem(index, graded("1", correct=index == 2)) for index in (0, 1, 2)]
    assert compare(summarised(backwards), summarised(forwards))["equal"] == 3


def test_other_problems_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different problems: 1 only in the second \(row-2\); evaluate both"):
        compare(result(1, 1), result(1, 1, 1))
    with pytest.raises(ValueError, match=r"7 only in the first \(row-1, row-2, row-3, row-4, row-5, \.\.\.\)"):
        compare(result(*[1] * 8), result(1))
    with pytest.raises(ValueError, match="the answers of row-0, row-1 differ"):
        compare(result(1, 1), result(1, 1, answer="4"))
    with pytest.raises(ValueError, match="their texts differ"):
        compare(result(1, 1), {**result(1, 1), "problems_digest": "other"})


def test_two_problems_of_one_id_are_refused() -> None:
    twice = summarised([problem(0, graded("1")), problem(0, graded("1"))])
    with pytest.raises(ValueError, match="two problems of one id"):
        compare(twice, twice)


def written(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_table_says_it_all(tmp_path: Path) -> None:
    first = written(tmp_path / "first.json", result(0, 1, 2, 3))
    second = written(tmp_path / "second.json", result(2, 2, 2, 2, temperature=1.0))
    console = Console(width=200)
    with console.capture() as capture:
        console.print(comparison_table((first, second)))
    lines = [" ".join(line.replace("│", " ").split()) for line in capture.get().splitlines()]
    assert f"first avg@4 0.3750 ({first})" in lines and f"second avg@4 0.5000 ({second})" in lines
    assert "p-value 0.75 (paired sign-flip test, two-sided, exact)" in lines
    assert "second is better on 2, equal on 1, worse on 1 problems" in lines
    assert "differs: temperature 0.6 in the first, 1.0 in the second" in lines
    assert any(line.startswith("difference +0.1250 (95% interval -") for line in lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; `lockstep eval POLICY --data FILE --json "),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "is no evaluation"),
        (b'{"rows": []}', "is no evaluation"),
    ],
)
def test_files_that_are_no_evaluation_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_result(path)
