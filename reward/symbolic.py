r"""Compares two expressions with math-verify, where it needs help said so: letters that differ in case, units,
braces against parentheses, equations that are false, decimals.

May run for ever or eat all memory on a hostile answer, so only `reward.worker` calls it in a run.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import TypeAlias

from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.logic import And
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import Basic, Eq, Expr, Float, I, MatrixBase, Rational, Symbol
from sympy.core.random import seed
from sympy.polys.polyerrors import BasePolynomialError

from reward.number import parse_number, stands_for
from reward.result import Reason
from reward.tidy import tidy
from reward.units import split_unit

# What sympy is known to raise on odd input. MemoryError is not here: it must end the worker.
_VERIFIER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BasePolynomialError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    NotImplementedError,
)
# Units are not left to math-verify: it takes the t of 5t for one.
_NORMALIZATION = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
_NUMBERS_SIDE_BY_SIDE = re.compile(r"[0-9] [0-9]")
_NOT_A_VARIABLE = re.compile(r"\\(?:text|operatorname|begin|end)\{[^{}]*\}|\\[A-Za-z]+")
_NAMED = re.compile(r".*(?:\\in|=)(?![A-Za-z])", re.DOTALL)
# Digits enough to tell whether a decimal is an irrational value, rounded.
_DIGITS = 50

_Expression: TypeAlias = Basic | MatrixBase


def verify_symbolic(extracted: str, gold: str) -> Reason:
    """Compare an answer with a gold one, both LaTeX or plain. No time or memory limit: the process sets them."""
    seed(0)  # sympy tries random points; a verdict must not depend on what was verified before
    (answer, measure), (gold, gold_measure) = _without_unit(extracted), _without_unit(gold)
    setting = (_mixes_case(answer) or _mixes_case(gold), should_treat_as_complex(answer + " " + gold))
    gold_expression = _parse(gold, *setting)
    if gold_expression is None:
        return Reason.BAD_GOLD
    expression = _parse(answer, *setting)
    if expression is None:
        return Reason.UNPARSABLE_ANSWER
    if _differ(measure, gold_measure) or _differ(_bracket(answer), _bracket(gold)):
        return Reason.WRONG
    try:
        equal = _equal(expression, gold_expression, answer)
    except _VERIFIER_ERRORS:
        return Reason.VERIFIER_ERROR
    return Reason.CORRECT if equal else Reason.WRONG


def _without_unit(text: str) -> tuple[str, str]:
    text, scale, measure = split_unit(tidy(text))
    if "\\pm" in text and "," not in text:  # the grammar reads it between two terms only
        text = ",".join(text.replace("\\pm", plus).replace("\\mp", minus) for plus, minus in ("+-", "-+"))
    return (text if scale == 1 else f"{scale}({text})"), measure


def _differ(one: str, other: str) -> bool:
    return bool(one and other and one != other)


def _mixes_case(text: str) -> bool:
    """Whether a letter is used in both cases, as the radii R and r: then they are two variables."""
    letters = set(_NOT_A_VARIABLE.sub("", text))
    return any(letter.isupper() and letter.lower() in letters for letter in letters)


@lru_cache(maxsize=512)  # the completions of a group share their gold answer, and many their answer
def _parse(text: str, keep_case: bool, is_complex: bool) -> _Expression | None:
    """The whole text as one expression: no picking of a likely number out of prose."""
    # The LaTeX grammar reads `5 6` as 5 + 6, like a mixed number.
    if _NUMBERS_SIDE_BY_SIDE.search(text):
        return None
    try:
        parsed: _Expression = latex2sympy(
            normalize_latex(text, _NORMALIZATION),
            is_real=not is_complex,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=not keep_case),
        )
    except MemoryError:
        raise
    except Exception:  # the grammar reports a syntax error as no narrower class
        return None
    return parsed.subs(Symbol("i", real=not is_complex), I) if isinstance(parsed, Expr) else parsed


def _bracket(text: str) -> str:
    """`{` or `(` if one pair of them holds several values and they are the whole text, or all that follows `x =`."""
    text = _NAMED.sub("", text).replace("\\{", "{").replace("\\}", "}")
    depth, holds_several = 0, False
    for position, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        holds_several |= depth == 1 and character in ",;"
        if depth == 0 and position < len(text) - 1:
            return ""
    return ("{" if text[0] == "{" else "(") if holds_several else ""


def _equal(answer: _Expression, gold: _Expression, written: str) -> bool:
    decimal = parse_number(written)
    if decimal is not None and decimal.decimals is not None and (value := _real_value(gold)) is not None:
        return value == decimal.value or stands_for(decimal, value)
    sides = list(_sides(answer))
    if sides and not isinstance(gold, Eq | And):
        values = [side for side in sides[:-1] if isinstance(side, Expr) and side.is_number]
        if not all(_same(value, sides[-1]) for value in values):
            return False  # 7 = \sqrt{5} states nothing
    return _same(answer, gold)


def _sides(expression: _Expression) -> Iterator[_Expression]:
    """The sides of an equation or of a chain of them; none for anything else."""
    equations = expression._unsorted_args if isinstance(expression, And) else (expression,)
    if all(isinstance(equation, Eq) for equation in equations):
        yield equations[0].lhs
        yield from (equation.rhs for equation in equations)


def _same(answer: _Expression, gold: _Expression) -> bool:
    # 0 disables math-verify's own limit, which needs SIGALRM and the main thread.
    return bool(verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=0, raise_on_error=True))


def _real_value(gold: _Expression) -> Fraction | None:
    value = gold.evalf(_DIGITS) if isinstance(gold, Expr) and gold.is_number else None
    return Fraction(str(value)) if isinstance(value, Float | Rational) else None
