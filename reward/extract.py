"""Finds the final answer in a completion. Linear in its length, whatever a policy may write."""

import re

BOXED = "\\boxed"

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
# An escape is taken whole, so that the brace of `\{` and of `\}` does not count.
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)
_SPACES_THEN_BRACE = re.compile(r"[ \t\r\n]*+\{")
# `\boxed 7`: without braces a box holds one number, no more.
_SPACES_THEN_NUMBER = re.compile(r"[ \t\r\n]*+([+-]?[0-9]++(?:[.,][0-9]++)*+)(?![A-Za-z0-9{^_/!]|\\[A-Za-z])")


def extract_answer(completion: str, marker: str) -> str | None:
    r"""Return the answer that `marker` announces, stripped of white space.

    completion: the policy's whole text.
    marker: `\boxed` for the content of the last `\boxed{...}` or `\fbox{...}`, braces nested, or the number of
        `\boxed 7`; any other text for what follows its last occurrence, to the end of that line.

    None if the marker is absent, its braces never close, or nothing but white space stands there.
    """
    answer = _last_boxed(completion) if marker == BOXED else _rest_of_line(completion, marker)
    return (answer.strip() or None) if answer is not None else None


def _rest_of_line(completion: str, marker: str) -> str | None:
    _, found, rest = completion.rpartition(marker)
    return rest.partition("\n")[0] if found else None


def _last_boxed(completion: str) -> str | None:
    """The last box decides: if it never closes, the completion was cut and an earlier box is no answer."""
    for box in reversed([match.end() for match in _BOX.finditer(completion)]):
        if brace := _SPACES_THEN_BRACE.match(completion, box):
            return _until_closed(completion, brace.end())
        if number := _SPACES_THEN_NUMBER.match(completion, box):
            return number[1]
    return None


def _until_closed(completion: str, start: int) -> str | None:
    depth = 1
    for token in _BRACE_OR_ESCAPE.finditer(completion, start):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return completion[start : token.start()]
    return None
