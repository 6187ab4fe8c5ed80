r"""Splits the unit off an answer: `5\text{cm}`, `73 apples`, `\$5`, `60^\circ`, `5^{th}`.

The question names the unit, so an answer may leave it out, but it may not name another. A noun (`73 apples`) is no
measure and is not compared. A letter that follows bare (`5m`, `5 t`) is a factor of a product, never a unit.
"""

import re
from fractions import Fraction

# Two spellings of one measure have one entry. Everything that is not here is a noun.
_SPELLINGS = {
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "dm": "dm decimeter decimetre",
    "m": "m meter metre",
    "km": "km kilometer kilometre",
    "inch": "in inch inches",
    "foot": "ft foot feet",
    "yard": "yd yard",
    "mile": "mi mile",
    "mg": "mg milligram",
    "g": "g gram",
    "kg": "kg kilogram",
    "lb": "lb pound",
    "oz": "oz ounce",
    "ml": "ml mL milliliter millilitre",
    "l": "l L liter litre",
    "gal": "gal gallon",
    "ms": "ms millisecond",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "yr year",
    "degree": "deg degree circ",
    "radian": "rad radian",
    "dollar": "dollar USD",
    "cent": "cent",
    "euro": "euro EUR",
    "mile/h": "mph",
    "km/h": "kph kmph",
}
MEASURES = {spelling: measure for measure, line in _SPELLINGS.items() for spelling in line.split()}
_SYMBOLS = {"\\$": "dollar", "\u20ac": "euro", "\u00a3": "pound sterling", "\u00a5": "yen"}
SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# Words that make of a number and what follows it another number, several, or none.
_NO_NOUNS = frozenset(
    """or and not to if is plus minus times over than squared cubed root half halves third thirds fourth fourths fifth
    fifths sixth sixths eighth eighths tenth tenths hundredth hundredths thousandth thousandths pi factorial mod modulo
    choose negative""".split()  # noqa: SIM905
)
_AREAS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}

_POWER = r"(?:\^\{?([0-9])\}?)?"
_DEGREES = re.compile(r"(?:\^\{?\\circ\}?|\\degree)$")
_ORDINAL = re.compile(r"(?<=[0-9])\^?\{?(?:\\text\{)?(?:st|nd|rd|th)\}?\}?$")
_IN_TEXT = re.compile(r"\\text\{([A-Za-z][A-Za-z /.]*)\}" + _POWER + "$")
# Without \text a word needs two letters to be a measure and four to be a noun: `ab` is a product.
_IN_PLAIN = re.compile(r"(?<=[0-9}]) ?([A-Za-z]{2}[A-Za-z /]*)" + _POWER + "$")
_FUNCTION = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|theta|alpha|beta)[a-z]?")


def split_unit(text: str) -> tuple[str, Fraction, str]:
    """tidy text -> (what stands before the unit, the scale that its words name, the measure or "").

    Without a unit: (text, 1, "").
    """
    sign = "-" if text.startswith("-") else ""
    bare = text.removeprefix("-")
    currency = next((symbol for symbol in _SYMBOLS if bare.startswith(symbol)), "")
    rest, scale, measure = _split_suffix(bare.removeprefix(currency))
    return sign + rest, scale, _SYMBOLS.get(currency, measure)


def _split_suffix(text: str) -> tuple[str, Fraction, str]:
    for pattern in (_IN_TEXT, _IN_PLAIN):
        match = pattern.search(text)
        named = _named(match[1], match[2], in_text=pattern is _IN_TEXT) if match else None
        if match and match.start() and named:
            return text[: match.start()].rstrip(), *named
    for pattern, measure in ((_DEGREES, "degree"), (_ORDINAL, "")):
        if match := pattern.search(text):
            return text[: match.start()], Fraction(1), measure
    return text, Fraction(1), ""


def _named(phrase: str, power: str | None, in_text: bool) -> tuple[Fraction, str] | None:
    """The scale and the measure of a phrase; None if it names neither these nor a noun."""
    words = phrase.replace(".", "").split()
    scale = Fraction(1)
    while words and _singular(words[0]) in SCALES:
        scale *= SCALES[_singular(words.pop(0))]
    if any(word.lower() in _NO_NOUNS or _singular(word) in SCALES or _FUNCTION.fullmatch(word) for word in words):
        return None
    if words and words[0].lower() in _AREAS:
        power = _AREAS[words.pop(0).lower()]
    measure = _measure(" ".join(words))
    if measure is None:
        return (scale, "") if in_text or not words or max(map(len, words)) >= 4 else None
    return scale, measure + (f"^{power}" if power and power != "1" else "")


def _measure(phrase: str) -> str | None:
    for spelling in (phrase, phrase.lower(), _singular(phrase)):
        if spelling in MEASURES:
            return MEASURES[spelling]
    parts = re.split(r" ?/ ?| per ", phrase.lower())
    return "/".join(_measure(part) or part for part in parts) if len(parts) > 1 else None


def _singular(word: str) -> str:
    return word.lower().removesuffix("s")
