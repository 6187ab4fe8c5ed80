"""Graded completions and problems, made up."""

from reward.result import Reason
from rl.data_columns import Row
from rl.eval_problem import Graded, ProblemResult


def graded(
    extracted: str | None, *, correct: bool = False, length: int = 4, finish_reason: str = "stop", text: str = "so"
) -> Graded:
    reason = Reason.CORRECT if correct else Reason.NO_ANSWER if extracted is None else Reason.WRONG
    return Graded(text, extracted, correct, reason, length, finish_reason)


def problem(index: int, *completions: Graded, answer: str = "3", source: str = "sums.jsonl") -> ProblemResult:
    return ProblemResult(Row(f"row-{index}", f"Problem {index}?", answer, source), index, completions)
