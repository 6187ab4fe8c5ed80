r"""The words of a problem, whatever its typesetting: what duplicates and contamination are looked for in.

A word is a run of letters, a number, an operator, or a single character of a script without spaces. Case, white space,
punctuation, `$` and LaTeX's layout commands do not count; `\dfrac` is `\frac`, `\times` is `*`.
"""

import re
import unicodedata

# Commands that say how a thing looks; and other spellings of one thing.
_LAYOUT = re.compile(
    r"\\(?:left|right|[Bb]igg?[lr]?|text(?:bf|it|rm)?|math(?:bb|bf|cal|it|rm)|operatorname|displaystyle|limits|q?quad"
    r"|boxed|mbox)(?![A-Za-z])"
)
_SPELLINGS = {
    **dict.fromkeys(("\\dfrac", "\\tfrac", "\\cfrac"), "frac"),
    **dict.fromkeys(("\\cdot", "\\times", "\N{MIDDLE DOT}", "\N{MULTIPLICATION SIGN}"), "*"),
    **dict.fromkeys(("\\div", "\N{DIVISION SIGN}"), "/"),
    **dict.fromkeys(("\\le", "\\leq", "\\leqslant", "\N{LESS-THAN OR EQUAL TO}"), "<="),
    **dict.fromkeys(("\\ge", "\\geq", "\\geqslant", "\N{GREATER-THAN OR EQUAL TO}"), ">="),
    **dict.fromkeys(("\\ne", "\\neq", "\N{NOT EQUAL TO}"), "!="),
    **{"\\lt": "<", "\\gt": ">", "\N{MINUS SIGN}": "-", "\N{SQUARE ROOT}": "sqrt", "\N{GREEK SMALL LETTER PI}": "pi"},
}
_SIGNS = re.escape("".join(sign for sign in _SPELLINGS if len(sign) == 1))
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9])(?:,(?:\\!)?|\{,\})(?=[0-9]{3}(?![0-9]))")
_BARE_FRACTION = re.compile(r"(?<=frac)\s*([0-9])\s*([0-9])")
_WORD = re.compile(rf"\\[a-z]+|[a-z]+|[0-9]+(?:\.[0-9]+)?|[^\W_]|[<>!]=|[-+*/^=<>!|%{_SIGNS}]")


def words(problem: str) -> tuple[str, ...]:
    """The words of a problem in order; never none, so that problems without any do not count as equal."""
    text = _LAYOUT.sub(" ", unicodedata.normalize("NFKC", problem)).lower()
    text = _BARE_FRACTION.sub(r" \1 \2 ", _THOUSANDS_COMMA.sub("", text))
    found = _WORD.findall(text)
    return tuple(_SPELLINGS.get(word, word.removeprefix("\\")) for word in found) or (problem,)


def numbers(problem_words: tuple[str, ...]) -> tuple[str, ...]:
    """The numbers among the words, sorted: problems of one form differ in these."""
    return tuple(sorted(word for word in problem_words if word[0].isdigit()))


def windows(problem_words: tuple[str, ...], length: int) -> set[tuple[str, ...]]:
    """The distinct runs of `length` words, of all words where there are fewer."""
    last = max(len(problem_words) - length, 0)
    return {problem_words[start : start + length] for start in range(last + 1)}
