"""What a verification returns: a score that always comes with its reason."""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a completion got its score; the list is closed."""

    CORRECT_INTEGER = "correct_integer"
    WRONG_INTEGER = "wrong_integer"
    CORRECT_SYMBOLIC = "correct_symbolic"
    WRONG_SYMBOLIC = "wrong_symbolic"
    NO_ANSWER = "no_answer"
    UNPARSABLE_ANSWER = "unparsable_answer"
    BAD_GOLD = "bad_gold"
    TIMEOUT = "timeout"
    WORKER_DIED = "worker_died"
    VERIFIER_ERROR = "verifier_error"


CORRECT = frozenset({Reason.CORRECT_INTEGER, Reason.CORRECT_SYMBOLIC})
FAILURES = frozenset({Reason.BAD_GOLD, Reason.TIMEOUT, Reason.WORKER_DIED, Reason.VERIFIER_ERROR})


@dataclass(frozen=True)
class RewardResult:
    """The verdict on one completion.

    score: 1.0 for a correct answer, 0.0 for anything else; it says nothing about the policy when `is_failure`.
    extracted: the answer found in the completion, None if there was none.
    reason: why the score is what it is.
    milliseconds: wall time the verification took.
    """

    score: float
    extracted: str | None
    reason: Reason
    milliseconds: float

    @classmethod
    def of(cls, reason: Reason, extracted: str | None, milliseconds: float) -> "RewardResult":
        """The result whose score follows from its reason."""
        return cls(1.0 if reason in CORRECT else 0.0, extracted, reason, milliseconds)

    @property
    def is_failure(self) -> bool:
        """True when the verifier or the gold answer failed, so that the 0.0 is no judgement of the completion."""
        return self.reason in FAILURES
