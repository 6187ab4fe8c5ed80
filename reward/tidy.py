r"""Strips an answer of its dress: delimiters, spacing and sizing commands, Unicode that has a LaTeX name.

What remains is the same text for all ways of setting the same formula, and is what every comparison starts from.
"""

import re
import unicodedata
from collections.abc import Callable

_UNICODE = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u00d7": "\\times ",
        "\u00b7": "\\cdot ",
        "\u22c5": "\\cdot ",
        "\u00f7": "\\div ",
        "\u2264": "\\le ",
        "\u2265": "\\ge ",
        "\u2260": "\\ne ",
        "\u2248": "\\approx ",
        "\u00b1": "\\pm ",
        "\u221e": "\\infty ",
        "\u03c0": "\\pi ",
        "\u03b8": "\\theta ",
        "\u221a": "\\sqrt ",
        "\u222a": "\\cup ",
        "\u2229": "\\cap ",
        "\u2208": "\\in ",
        "\u2205": "\\emptyset ",
        "\u00b0": "^\\circ ",
        "\u00b2": "^2",
        "\u00b3": "^3",
        "\u00bd": "\\frac{1}{2}",
        "\u2019": "'",
    }
)
# Letters, so that a name in any script can be compared, and what the table above left of symbols and currencies.
_CATEGORIES = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Sc", "Sm"}

_ARGUMENT = r"[A-Za-z0-9]|\\(?:pi|theta)(?![A-Za-z])|\{(?:[^{}]|\{[^{}]*\})*+\}"


def _braced_fraction(match: re.Match[str]) -> str:
    top, bottom = (argument if argument.startswith("{") else f"{{{argument}}}" for argument in match.groups())
    return f"\\frac{top}{bottom}"


_Replacement = str | Callable[[re.Match[str]], str]
_REPLACEMENTS: list[tuple[re.Pattern[str], _Replacement]] = [
    (re.compile(r"(?<=[0-9])(?:\\,|\{,\}|,\\!)(?=[0-9]{3}(?![0-9]))"), ","),  # 12\,345
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits)(?![A-Za-z])"), ""),
    (re.compile(r"(?<!\\)\\!"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\\hspace\*?\{[^{}]*\}"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:mathbf|boldsymbol|bm|pmb)(?![A-Za-z])\s*(?=\{)"), ""),
    (re.compile(r"\\mathrm\s*\{\s*([eidT])\s*\}"), r"\1"),
    (re.compile(r"\\(?:textbf|textit|textrm|textnormal|textsf|texttt|mathrm|mathit|mbox|rm)(?![A-Za-z])"), r"\\text"),
    # One-token arguments, as TeX reads them: \frac12, \frac\pi4, \sqrt3.
    (re.compile(rf"\\frac(?![A-Za-z]) ?({_ARGUMENT}) ?({_ARGUMENT})"), _braced_fraction),
    (re.compile(r"\\sqrt(?![A-Za-z]) ?(\[[^\[\]]*\])? ?([A-Za-z0-9])"), r"\\sqrt\1{\2}"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"(?<!\\)(?:\$|\\[()\[\]])"), ""),
    # White space counts between words and digits only, and in 1, 234, which is not 1,234.
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<![A-Za-z0-9])(?<![0-9],) | (?![A-Za-z0-9])"), ""),
]
# Nobody wraps an answer in more; each costs a walk over the text.
MAX_LAYERS = 8
_WRAPPER = re.compile(r"(?:\\boxed|\\fbox)?\{")


def is_clean(text: str) -> bool:
    """False for characters that hide or look like others: controls, zero width, directions, foreign digits."""
    return all(map(_is_plain, text))


def _is_plain(character: str) -> bool:
    if character.isascii():
        return character.isprintable() or character in "\t\r\n"
    return ord(character) in _UNICODE or unicodedata.category(character) in _CATEGORIES


def tidy(text: str) -> str:
    """The text in its plainest form, on one line."""
    text = text.translate(_UNICODE)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    for _ in range(MAX_LAYERS):
        text = _unwrapped(text)
    return text


def _unwrapped(text: str) -> str:
    """Without one layer of what stands around a whole answer: stars, a full stop, braces."""
    text = text.strip(" \n")
    if len(text) > 4 and text.startswith("**") and text.endswith("**"):
        return text[2:-2]
    if text.endswith((",", ";")) or (text.endswith(".") and not text.endswith("..")):
        return text[:-1]
    opening = _WRAPPER.match(text)
    return text[opening.end() : -1] if opening and closing_brace(text, opening.end() - 1) == len(text) - 1 else text


def closing_brace(text: str, opening: int) -> int:
    """The index of the brace that closes the one at `opening`; -1 if none does."""
    depth = 0
    for position in range(opening, len(text)):
        if text[position] in "{}" and not (position and text[position - 1] == "\\"):
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return position
    return -1
