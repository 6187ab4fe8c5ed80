"""Finds the final answer in a completion. Linear in its length, whatever a policy may write."""

import re

BOXED = "\\boxed"

# An escape is taken whole, so that the brace of `\{` and of `\}` does not count.
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)
_SPACES_THEN_BRACE = re.compile(r"[ \t\r\n]*+\{")


def extract_answer(completion: str, marker: str) -> str | None:
    r"""Return the answer that `marker` announces, stripped of white space.

    completion: the policy's whole text.
    marker: `\boxed` for the content of the last `\boxed{...}`, braces nested; any other text for what follows its
        last occurrence, to the end of that line.

    None if the marker is absent, its braces never close, or nothing but white space stands there.
    """
    answer = _last_boxed(completion) if marker == BOXED else _rest_of_line(completion, marker)
    return (answer.strip() or None) if answer is not None else None


def _rest_of_line(completion: str, marker: str) -> str | None:
    _, found, rest = completion.rpartition(marker)
    return rest.partition("\n")[0] if found else None


def _last_boxed(completion: str) -> str | None:
    """The last `\\boxed{` decides: if it never closes, the completion was cut and an earlier box is no answer."""
    start = completion.rfind(BOXED)
    while start >= 0:
        brace = _SPACES_THEN_BRACE.match(completion, start + len(BOXED))
        if brace:
            return _until_closed(completion, brace.end())
        start = completion.rfind(BOXED, 0, start)
    return None


def _until_closed(completion: str, start: int) -> str | None:
    depth = 1
    for token in _BRACE_OR_ESCAPE.finditer(completion, start):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return completion[start : token.start()]
    return None
