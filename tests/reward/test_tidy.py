"""The plainest form of a text, and what is too strange to have one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.tidy import MAX_LAYERS, closing_brace, is_clean, tidy


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (" 73.\n", "73"),
        ("$$73$$", "73"),
        ("\\$73", "\\$73"),
        ("{{73}}", "73"),
        ("\\boxed{\\fbox{73}}", "73"),
        ("{1}{2}", "{1}{2}"),
        ("\\{1\\}", "\\{1\\}"),
        ("**73**", "73"),
        ("73...", "73..."),
        ("5 6", "5 6"),
        ("5\\ 6", "5 6"),
        ("5\\,\\text{ cm }", "5\\text{cm}"),
        ("12\\,345", "12,345"),
        ("12{,}345", "12,345"),
        ("12\\,34", "12 34"),
        ("1,  234", "1, 234"),
        ("( 1 , 2 )", "(1,2)"),
        ("x  y", "x y"),
        ("\\sin x", "\\sin x"),
        ("\\left( \\frac12 \\right]", "(\\frac{1}{2}]"),
        ("\\bigl\\{1\\bigr\\}", "\\{1\\}"),
        ("\\dfrac 3 4", "\\frac{3}{4}"),
        ("\\tfrac\\pi4", "\\frac{\\pi}{4}"),
        ("\\frac{\\sqrt2}2", "\\frac{\\sqrt{2}}{2}"),
        ("\\sqrt[3]2", "\\sqrt[3]{2}"),
        ("\\mathrm{cm}", "\\text{cm}"),
        ("\\mathrm{e}^x", "e^x"),
        ("\\mathbf{v}", "v"),
        ("x \\leq 3 \\neq y", "x\\le 3\\ne y"),
        ("\\leqq", "\\leqq"),
        ("\\begin{pmatrix}1 \\\\ 2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("\\begin{pmatrix}1 \\\\ (2)\\end{pmatrix}", "\\begin{pmatrix}1\\\\(2)\\end{pmatrix}"),
        ("\u2212\u221e < x \u2264 \u03c0", "-\\infty<x\\le\\pi"),
        ("60\u00b0", "60^\\circ"),
        ("", ""),
    ],
)
def test_tidy(text: str, plain: str) -> None:
    assert tidy(text) == plain


@given(st.text("0123456789abxy+-*/^_(),.", max_size=30))
def test_what_is_plain_stays(text: str) -> None:
    assert tidy(tidy(text)) == tidy(text)


@given(st.text("xy+1", min_size=1), st.integers(0, MAX_LAYERS))
def test_layers_fall_off(text: str, layers: int) -> None:
    assert tidy("{" * layers + text + "}" * layers) == text


@pytest.mark.parametrize(
    "text", ["73", "\\frac12\t\n", "x \u2264 3", "\u03c0", "caf\u00e9", "\u5076\u6570", "\u20ac5", "\u2211"]
)
def test_clean(text: str) -> None:
    assert is_clean(text)


@pytest.mark.parametrize(
    "text",
    ["7\x003", "\x1b[0m", "\u200b", "\u202e", "\u2066", "\ufeff", "\ud800", "\uff17", "\u0667", "\u2460", "\ue000"],
)
def test_not_clean(text: str) -> None:
    assert not is_clean(text)


@pytest.mark.parametrize(("text", "end"), [("{}", 1), ("{{}}", 3), ("{\\}}", 3), ("{", -1), ("{}{}", 1)])
def test_closing_brace(text: str, end: int) -> None:
    assert closing_brace(text, 0) == end
