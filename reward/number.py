r"""Numbers as people write them, read exactly: `073`, `-1,234.5`, `\frac{3}{4}`, `2\frac12`, `0.\overline{3}`,
`1.5 \times 10^3`, `50\%`, `x = 5`, `5\text{ cm}`, `1011_2`.

Only what is written out counts: `2+3`, `5!`, `\sqrt{9}` and `6/3` leave an operation to the reader and are no numbers.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from reward.units import split_unit

# Decimals that a decimal must show to stand for a value that it does not equal, such as 0.333333 for 1/3.
MIN_DECIMALS = 6
# Beyond this a literal is no answer, and its power of ten too large to write down.
MAX_DIGITS = 400

_DIGITS = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})++|[0-9]++)"
_INTEGER = re.compile(_DIGITS)
_DECIMAL = re.compile(rf"({_DIGITS})?\.([0-9]*+)(?:\\(?:overline|bar|dot)\{{([0-9]+)\}})?")
_FRAC = re.compile(r" ?\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}")
_SLASH = re.compile(r"(?:([0-9]+) )?(-?[0-9]+)/(-?[0-9]+)")
_SCIENTIFIC = re.compile(r"(?:([1-9](?:\.[0-9]+)?) ?(?:\\times|\\cdot|\*|x) ?)?10\^(?:\{(-?[0-9]{1,3})\}|([0-9]))")
_BASE = re.compile(r"([0-9]+)_(?:\{([0-9]{1,2})\}|([0-9]))")
_PERCENT = re.compile(r" ?(?:\\?%|percent|\\text\{(?:\\?%|percent)\})$")
_IN_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_EQUALS = re.compile(r"(?<![<>])(?<![A-Za-z}]!)=")
_PARENTHESES = re.compile(r"\([^()]*\)")
# What makes the left side of an equation more than the name of one value.
_SEVERAL = re.compile(r"[,;<>|]|\\(?:ne|le|ge|in|equiv|cup|to|lt|gt|pm|text\{(?:or|and)\})(?![A-Za-z])|\b(?:or|and)\b")


@dataclass(frozen=True)
class Number:
    """value: exact. face: without the percent sign. decimals: places shown, None if not written as a decimal.

    undone: a quotient that comes out even, such as 6/3. measure: the unit's. symbol: the letter before `=`.
    """

    value: Fraction
    face: Fraction
    decimals: int | None = None
    undone: bool = False
    measure: str = ""
    base: int | None = None
    symbol: str = ""

    def __str__(self) -> str:
        percent = "%" if self.value != self.face else ""
        base = f"_{self.base}" if self.base else ""
        return f"{self.face}{percent}{base} {self.measure}".strip()


def parse_number(text: str) -> Number | None:
    """The number that a tidy text is, or None. `x = 5` and `1/3 = 0.333333` are; `7 = 5` and `x = 1, y = 2` are not."""
    exact, _, rounded = text.partition("\\approx")
    return _last_side(exact) or _last_side(rounded)


def same_number(answer: Number, gold: Number) -> bool:
    """Whether the answer gives the gold value. Units, bases and symbols count where both name one.

    A percent sign may be left out or added where that cannot change a fraction's meaning: from 1 upwards.
    """
    named = (answer.measure, gold.measure), (answer.base, gold.base), (answer.symbol, gold.symbol)
    if any(one and other and one != other for one, other in named):
        return False
    only_one_percent = (answer.value == answer.face) != (gold.value == gold.face)
    if only_one_percent and answer.face == gold.face and abs(gold.face) >= 1:
        return True
    return answer.value == gold.value or stands_for(answer, gold.value) or stands_for(gold, answer.value)


def stands_for(decimal: Number, value: Fraction) -> bool:
    """Whether it is the value, no whole number, rounded or cut to six or more decimals and six or more digits."""
    if decimal.decimals is None or decimal.decimals < MIN_DECIMALS or value.denominator == 1:
        return False
    unit = Fraction(1, 10**decimal.decimals)
    shown, scaled = abs(decimal.value) / unit, abs(value) / unit
    same_sign = (decimal.value < 0) == (value < 0)
    return (
        same_sign
        and shown >= 10 ** (MIN_DECIMALS - 1)
        and shown in (math.floor(scaled), math.floor(scaled + Fraction(1, 2)))
    )


def _last_side(text: str) -> Number | None:
    *before, last = _EQUALS.split(text)
    number = _literal(last)
    if number is None or any(_SEVERAL.search(_PARENTHESES.sub("", side)) for side in before):
        return None
    for other in map(_literal, before):
        if other is not None and other.measure == number.measure and other.value != number.value:
            return None
    symbol = before[0].strip().lower() if before else ""
    return replace(number, symbol=symbol if len(symbol) == 1 else "")


def _literal(text: str) -> Number | None:
    text = text.strip()
    if len(text) > MAX_DIGITS:
        return None
    if text.startswith("(") and text.find(")") == len(text) - 1 and text.rfind("(") == 0:
        text = text[1:-1]
    if in_text := _IN_TEXT.fullmatch(text):
        text = in_text[1]
    percent = _PERCENT.search(text)
    text, scale, measure = split_unit(text[: percent.start()] if percent else text)
    sign = -1 if text.startswith("-") else 1
    text = text.removeprefix("-" if sign < 0 else "+").lstrip()
    number = next((found for form in _FORMS if (found := form(text))), None)
    if number is None:
        return None
    face = sign * scale * number.value
    decimals = number.decimals + 2 if percent and number.decimals is not None else number.decimals
    return replace(number, value=face / 100 if percent else face, face=face, decimals=decimals, measure=measure)


def _integer(text: str) -> Number | None:
    return _exactly(Fraction(text.replace(",", ""))) if _INTEGER.fullmatch(text) else None


def _decimal(text: str) -> Number | None:
    match = _DECIMAL.fullmatch(text)
    if match is None or text == ".":
        return None
    places, repeated = len(match[2]), match[3]
    value = Fraction(int((match[1] or "0").replace(",", "") + match[2]), 10**places)
    if repeated:
        return _exactly(value + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**places))
    return replace(_exactly(value), decimals=places)


def _fraction(text: str) -> Number | None:
    match = _SLASH.fullmatch(_FRAC.sub(r" \1/\2", text).strip())
    if match is None or not int(match[3]):
        return None
    value = Fraction(int(match[2]), int(match[3]))
    if match[1]:
        return _exactly(int(match[1]) + value) if 0 < value < 1 else None
    return replace(_exactly(value), undone=value.denominator == 1)


def _scientific(text: str) -> Number | None:
    match = _SCIENTIFIC.fullmatch(text)
    if match is None:
        return None
    exponent = int(match[2] or match[3])
    return _exactly(Fraction(match[1] or 1) * Fraction(10) ** exponent) if abs(exponent) <= MAX_DIGITS else None


def _in_base(text: str) -> Number | None:
    match = _BASE.fullmatch(text)
    return replace(_exactly(Fraction(match[1])), base=int(match[2] or match[3])) if match else None


def _exactly(value: Fraction) -> Number:
    return Number(value, value)


_FORMS: tuple[Callable[[str], Number | None], ...] = (_integer, _decimal, _fraction, _scientific, _in_base)
