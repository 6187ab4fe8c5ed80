"""Numbers and units as they are written: their exact value, or none."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.number import MAX_DIGITS, parse_number, same_number, stands_for
from reward.units import split_unit


@pytest.mark.parametrize(
    ("text", "value", "shown"),
    [
        ("073", Fraction(73), "73"),
        ("-1,234.50", Fraction(-2469, 2), "-2469/2"),
        (".25", Fraction(1, 4), "1/4"),
        ("\\frac{-3}{6}", Fraction(-1, 2), "-1/2"),
        ("-3/6", Fraction(-1, 2), "-1/2"),
        ("-2\\frac{1}{2}", Fraction(-5, 2), "-5/2"),
        ("0.1\\overline{6}", Fraction(1, 6), "1/6"),
        ("1.5\\times 10^{-3}", Fraction(3, 2000), "3/2000"),
        ("12.5\\%", Fraction(1, 8), "25/2%"),
        ("1011_2", Fraction(1011), "1011_2"),
        ("x=5", Fraction(5), "5"),
        ("\\frac{1}{3}\\approx 0.33", Fraction(1, 3), "1/3"),
        ("\\sqrt{2}\\approx 1.41", Fraction(141, 100), "141/100"),
        ("3\\text{million dollars}", Fraction(3_000_000), "3000000 dollar"),
        ("-\\$5", Fraction(-5), "-5 dollar"),
    ],
)
def test_value(text: str, value: Fraction, shown: str) -> None:
    number = parse_number(text)
    assert number is not None
    assert (number.value, str(number)) == (value, shown)


@pytest.mark.parametrize(
    "text",
    [
        *["", ".", "-", "x", "5x", "5 6", "1,23", "12,34,567", "1/0", "1/2/3", "2\\frac{3}{2}", "2\\frac{-1}{2}"],
        *["--5", "5-", "+-5", "1.2.3", "0.5.", "\\frac{1.5}{2}", "10^{1000}", "10^{x}", "12\\times 10^3", "5_{x}"],
        *["7=5", "x=1,y=2", "x\\le 5=5", "x!=5", "9" * (MAX_DIGITS + 1), "|5|", "[5]", "((5))", "5\\%\\%"],
    ],
)
def test_no_number(text: str) -> None:
    assert parse_number(text) is None


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=8))
def test_decimals_are_read_exactly(value) -> None:
    number = parse_number(f"{value:f}")
    assert number is not None
    assert (number.value, number.decimals) == (Fraction(value), 8)


@pytest.mark.parametrize(
    ("decimal", "value", "stands"),
    [
        ("0.333333", Fraction(1, 3), True),
        ("0.666666", Fraction(2, 3), True),
        ("0.666667", Fraction(2, 3), True),
        ("0.666668", Fraction(2, 3), False),
        ("-0.666667", Fraction(2, 3), False),
        ("0.33333", Fraction(1, 3), False),
        ("0.000333", Fraction(1, 3000), False),
        ("5.000000", Fraction(5), False),
        ("\\frac13", Fraction(1, 3), False),
    ],
)
def test_a_decimal_stands_for_a_value_it_rounds_or_cuts(decimal: str, value: Fraction, stands: bool) -> None:
    number = parse_number(decimal.replace("\\frac13", "\\frac{1}{3}"))
    assert number is not None
    assert stands_for(number, value) is stands


@given(st.fractions(max_denominator=1000), st.fractions(max_denominator=1000))
def test_the_same_number_whoever_is_asked(one: Fraction, other: Fraction) -> None:
    first, second = parse_number(str(one)), parse_number(str(other))
    assert first is not None and second is not None
    assert same_number(first, second) == same_number(second, first) == (one == other)


@pytest.mark.parametrize(
    ("text", "rest", "scale", "measure"),
    [
        ("5", "5", 1, ""),
        ("5\\text{cm}", "5", 1, "cm"),
        ("5\\text{cm}^2", "5", 1, "cm^2"),
        ("5\\text{square feet}", "5", 1, "foot^2"),
        ("5 kilometers", "5", 1, "km"),
        ("5\\text{miles per hour}", "5", 1, "mile/h"),
        ("5\\text{mph}", "5", 1, "mile/h"),
        ("5\\text{m/s}", "5", 1, "m/s"),
        ("5\\text{apples}", "5", 1, ""),
        ("5 apples", "5", 1, ""),
        ("2\\text{dozen eggs}", "2", 12, ""),
        ("5^\\circ", "5", 1, "degree"),
        ("5^{th}", "5", 1, ""),
        ("\\$5", "5", 1, "dollar"),
        ("-\\$5", "-5", 1, "dollar"),
        ("\\$" * 200 + "5", "\\$" * 199 + "5", 1, "dollar"),
        ("x^{2}\\text{m}", "x^{2}", 1, "m"),
        ("5m", "5m", 1, ""),
        ("5 ab", "5 ab", 1, ""),
        ("2sinx", "2sinx", 1, ""),
        ("5\\text{or less}", "5\\text{or less}", 1, ""),
        ("\\text{apples}", "\\text{apples}", 1, ""),
    ],
)
def test_split_unit(text: str, rest: str, scale: int, measure: str) -> None:
    assert split_unit(text) == (rest, scale, measure)
