"""Errors as OpenAI's clients read them: a status and {"error": {message, type, param, code}}."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from rl.serve.schema import NEUTRAL, WITHOUT_EFFECT, Body

SHOWN_CHARACTERS = 60


class RequestError(Exception):
    """A request that is answered with `status` and one message. retry_after: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def parse_body(kind: type[Body], given: object) -> Any:
    """The body as `kind`. Raises RequestError that names field, value and rule."""
    if not isinstance(given, dict):
        raise RequestError(400, f"the body is {_shown(given)}; it must be a JSON object")
    own = {name: value for name, value in given.items() if name not in WITHOUT_EFFECT}
    for name in [name for name in own if name in NEUTRAL and name not in kind.model_fields]:
        _require_neutral(name, own.pop(name), given)
    for name in own:
        if name not in kind.model_fields:
            near = difflib.get_close_matches(name, kind.model_fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(sorted(kind.model_fields))}"
            raise RequestError(400, f"unknown field {name!r}: {hint}", param=name)
    try:
        return kind.model_validate(own)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"] if not _is_choice(part))
        raise RequestError(400, f"{field} = {_shown(first['input'])}: {first['msg']}", param=field or None) from None


def _require_neutral(name: str, value: object, given: Mapping[str, object]) -> None:
    allowed = (*NEUTRAL[name], given.get("n", 1)) if name == "best_of" else NEUTRAL[name]
    if value not in allowed:
        raise RequestError(
            400, f"{name} = {_shown(value)}: not supported, and it would change the answer; leave it out", param=name
        )


def _is_choice(part: object) -> bool:
    """The names that pydantic gives the alternatives of a union are not the client's."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int"))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
