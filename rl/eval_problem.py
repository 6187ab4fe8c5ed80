"""What an evaluation knows of one problem: every completion graded, and the row that this makes in the result."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from reward.number import parse_number
from reward.result import FAILURES, Reason, RewardResult
from reward.tidy import tidy
from reward.verify import MAX_ANSWER_CHARS
from rl.data_columns import Row
from rollout.request import Completion


@dataclass(frozen=True)
class Graded:
    """One completion and its verdict. `length` is in tokens; `text` may have been dropped to save memory."""

    text: str
    extracted: str | None
    correct: bool
    reason: Reason
    length: int
    finish_reason: str

    @classmethod
    def of(cls, completion: Completion, text: str, result: RewardResult) -> "Graded":
        return cls(
            text=text,
            extracted=result.extracted,
            correct=result.score > 0,
            reason=result.reason,
            length=len(completion.token_ids),
            finish_reason=completion.finish_reason,
        )

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def is_failure(self) -> bool:
        return self.reason in FAILURES


@dataclass(frozen=True)
class ProblemResult:
    """A problem with its graded completions, in the order of their sample numbers."""

    row: Row
    index: int  # of the row in its data set
    completions: tuple[Graded, ...]

    @property
    def correct(self) -> int:
        return sum(each.correct for each in self.completions)

    def without_texts(self) -> "ProblemResult":
        return replace(self, completions=tuple(replace(each, text="") for each in self.completions))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ProblemResult":
        graded = tuple(Graded(**{**each, "reason": Reason(each["reason"])}) for each in content["completions"])
        row = content["row"]
        messages = tuple((role, text) for role, text in row["messages"])
        return cls(Row(**{**row, "messages": messages}), content["index"], graded)

    def summary(self) -> dict[str, Any]:
        """The problem's row in the result of an evaluation."""
        winner = majority(self.completions)
        return {
            "id": self.row.id,
            "source": self.row.source,
            "answer": self.row.answer,
            "correct": self.correct,
            "samples": len(self.completions),
            "majority": winner.extracted if winner else None,
            "majority_correct": winner is not None and winner.correct,
            "mean_length": float(np.mean([each.length for each in self.completions])),
            "truncated": sum(each.truncated for each in self.completions),
            "no_answer": sum(each.extracted is None for each in self.completions),
            "verifier_failures": sum(each.is_failure for each in self.completions),
        }


def majority(completions: Sequence[Graded]) -> Graded | None:
    """A completion with the answer that most of them give; None if none votes.

    Truncated completions and those without an answer do not vote. Answers of one normal form are one answer, and right
    if any of them was found right. A tie goes to the answer that was given first, by sample number.
    """
    votes: dict[str, list[Graded]] = {}
    for each in completions:
        if each.extracted is not None and not each.truncated:
            votes.setdefault(normal_form(each.extracted), []).append(each)
    winners = max(votes.values(), key=len, default=[])
    return next((each for each in winners if each.correct), winners[0] if winners else None)


def normal_form(answer: str) -> str:
    r"""The answer such that all spellings of a number are equal, as the verifier reads them: 073, $73$, 73.; 1/2, 0.5.

    Other answers lose what sets them only: spaces, dollar signs, \left. Numbers that are left to work out, such as 6/3
    and 2 + 3, are such answers.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return answer
    text = tidy(answer)
    number = parse_number(text)
    if number is None or number.undone:
        return text
    return f"{number.value}_{number.base}" if number.base else str(number.value)
