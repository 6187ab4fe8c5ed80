"""Words of problems: what typesetting must not change, and what must not be lost."""

import pytest

from rl.problem_text import numbers, windows, words


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find $m+n$.", "find  m + n"),
        ("Let $\\left(\\dfrac{1}{2}\\right)$", "let ( \\tfrac 12 )"),
        ("$3 \\times 4 \\le 5$", "3\N{MULTIPLICATION SIGN}4 \N{LESS-THAN OR EQUAL TO} 5"),
        ("$1{,}234{,}567$ or $1,\\!000$", "1,234,567 or 1000"),
        ("\\textbf{Alice} has $x\\ge 2$", "Alice has x \\geq 2"),
        ("\N{MATHEMATICAL ITALIC SMALL X}=1", "x = 1"),
        ("Is $a-b$ odd?", "Is a\N{MINUS SIGN}b odd?"),
    ],
)
def test_typesetting_does_not_count(one: str, other: str) -> None:
    assert words(one) == words(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("7*3+5", "7+3*5"),
        ("turn left twice", "turn right twice"),
        ("$x<y$", "$x>y$"),
        ("$a \\leftarrow b$", "$a \\rightarrow b$"),
        ("at $1,2$ and $3$", "at $12$ and $3$"),
        ("$x=1.5$", "$x=15$"),
        ("maximum", "minimum"),
        ("?!", "??"),
        ("\u6c42\u548c", "\u6c42\u5dee"),
    ],
)
def test_meaning_does(one: str, other: str) -> None:
    assert words(one) != words(other)


def test_words_by_hand() -> None:
    assert words("If $\\frac{a}{12} = 3.5$, find $a^2$!") == (
        *("if", "frac", "a", "12", "=", "3.5", "find", "a", "^", "2"),
        "!",
    )


def test_numbers_are_sorted_and_keep_repeats() -> None:
    assert numbers(words("7 and 3 and 7 and x")) == ("3", "7", "7")


def test_windows() -> None:
    assert windows(("a", "b", "a", "b"), 2) == {("a", "b"), ("b", "a")}
    assert windows(("a",), 3) == {("a",)}
