"""What a verification or a user's function returns: a number that always comes with its reason."""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a completion got its score; the list is closed."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    WRONG_FORM = "wrong_form"  # words or several values for a number, or work left undone: 2 + 3, 5!, an integral
    UNPARSABLE_ANSWER = "unparsable_answer"
    OK = "ok"  # a user's function returned a number
    BAD_GOLD = "bad_gold"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    FORBIDDEN = "forbidden"  # the verifier was led to open, run or connect to something
    WORKER_DIED = "worker_died"
    VERIFIER_ERROR = "verifier_error"
    USER_ERROR = "user_error"


FAILURES = frozenset(
    {
        Reason.BAD_GOLD,
        Reason.TIMEOUT,
        Reason.OUT_OF_MEMORY,
        Reason.FORBIDDEN,
        Reason.WORKER_DIED,
        Reason.VERIFIER_ERROR,
        Reason.USER_ERROR,
    }
)


class Method(StrEnum):
    """How an answer was compared with the gold one; the list is closed."""

    NONE = "none"  # it was not: no answer, or no gold
    IDENTICAL = "identical"
    INTEGER = "integer"
    NUMBER = "number"
    CHOICE = "choice"
    TEXT = "text"
    SYMBOLIC = "symbolic"


@dataclass(frozen=True)
class RewardResult:
    """The verdict on one completion.

    score: 1.0 for a correct answer, 0.0 for anything else; it says nothing about the policy when `is_failure`.
    extracted: the answer found in the completion, None if there was none.
    reason: why the score is what it is.
    milliseconds: wall time the verification took.
    gold: the gold answer in the form it was compared in, None if it never was.
    method: how the two were compared.
    message: what a worker said of a failure, else empty.
    """

    score: float
    extracted: str | None
    reason: Reason
    milliseconds: float
    gold: str | None = None
    method: Method = Method.NONE
    message: str = ""

    @classmethod
    def of(
        cls,
        reason: Reason,
        extracted: str | None,
        milliseconds: float,
        gold: str | None = None,
        method: Method = Method.NONE,
        message: str = "",
    ) -> "RewardResult":
        """The result whose score follows from its reason."""
        return cls(float(reason is Reason.CORRECT), extracted, reason, milliseconds, gold, method, message)

    @property
    def is_failure(self) -> bool:
        """True when the verifier or the gold answer failed, so that the 0.0 is no judgement of the completion."""
        return self.reason in FAILURES


@dataclass(frozen=True)
class CallResult:
    """What a user's function made of one item.

    value: the finite number it returned, None if there is none.
    reason: `ok`, or why there is no value.
    message: empty, or what went wrong: the error and its line, the limit, the worker's exit status.
    milliseconds: wall time of the call.
    """

    value: float | None
    reason: Reason
    message: str
    milliseconds: float

    @property
    def is_failure(self) -> bool:
        """True when there is no value."""
        return self.reason in FAILURES
