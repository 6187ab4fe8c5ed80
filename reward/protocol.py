"""What a worker sends its parent: one line of JSON when it is ready, then one for each item."""

import json
from dataclasses import asdict, dataclass

from reward.result import Reason

# A reason and a short message; more is no reply.
MAX_REPLY_BYTES = 1 << 16
MAX_MESSAGE_CHARS = 500


class Garbled(ValueError):
    """What came is no reply."""


@dataclass(frozen=True)
class Reply:
    """The answer to one item, or, as the first line, `ok` for a worker that is ready.

    value: what a user's function returned. retire: the worker is worn out, or gone, and must be replaced.
    """

    reason: Reason
    message: str = ""
    value: float | None = None
    retire: bool = False

    def encode(self) -> bytes:
        return json.dumps({**asdict(self), "message": self.message[:MAX_MESSAGE_CHARS]}).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> "Reply":
        """Raises Garbled."""
        try:
            fields = json.loads(line)
            reply = cls(**{**fields, "reason": Reason(fields["reason"])})
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise Garbled(f"{line[:80]!r}") from error
        if not isinstance(reply.message, str) or not isinstance(reply.value, float | None):
            raise Garbled(f"{line[:80]!r}")
        return reply
