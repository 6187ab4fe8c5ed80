"""Which problems of a source are worth training on: by length, by kind of answer, by how often a policy solves them."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from rl.data_columns import Row, comparable_answer, is_whole_number
from rl.data_config import AnswerType, FilterConfig

_DECIMAL = re.compile(r"-?[0-9]*\.[0-9]+")
_FRACTION = re.compile(r"-?(?:[0-9]+/[0-9]+|\\[dtc]?frac(?:\{-?[0-9]+\}\{[0-9]+\}|[0-9][0-9]))")
_CHOICE = re.compile(r"(?:\\(?:text|mathrm|textbf)\{)?\(?[A-J]\)?\}?\.?")
_AIME_DIGITS = 3


def answer_types(answer: str) -> set[AnswerType]:
    """The kinds that an answer is of; an integer from 0 to 999 is of two."""
    plain = comparable_answer(answer)
    if is_whole_number(answer):
        return {"integer", "integer_0_999"} if plain.isdigit() and len(plain) <= _AIME_DIGITS else {"integer"}
    shapes: dict[AnswerType, re.Pattern[str]] = {"decimal": _DECIMAL, "fraction": _FRACTION, "choice": _CHOICE}
    return {name for name, shape in shapes.items() if shape.fullmatch(plain)} or {"expression"}


def filter_rows(rows: Sequence[Row], config: FilterConfig) -> tuple[list[Row], Counter[str]]:
    """The rows that every filter lets through, and how many each filter, the first one to object, left out.

    `prompt_tokens` is not looked at: it takes a tokenizer. Raises ValueError where a pass rate is asked for, and a row
    has none.
    """
    tests = _tests(config)
    kept, dropped = [], Counter[str]()
    for row in rows:
        failed = next((name for name, test in tests.items() if not test(row)), None)
        if failed is None:
            kept.append(row)
        else:
            dropped[failed] += 1
    return kept, dropped


def _tests(config: FilterConfig) -> dict[str, Callable[[Row], bool]]:
    tests: dict[str, Callable[[Row], bool]] = {}
    if config.problem_chars:
        shortest, longest = config.problem_chars
        tests["problem_chars"] = lambda row: shortest <= len(row.problem) <= longest
    if config.answer_types:
        wanted = set(config.answer_types)
        tests["answer_types"] = lambda row: not wanted.isdisjoint(answer_types(row.answer))
    if config.pass_rate:
        least, greatest = config.pass_rate
        tests["pass_rate"] = lambda row: least <= measured_pass_rate(row, "data.filters.pass_rate") <= greatest
    return tests


def measured_pass_rate(row: Row, asked_by: str) -> float:
    """Raises ValueError, naming the recipe's key that asks, where none was measured."""
    if row.pass_rate is None:
        raise ValueError(
            f"{row.source}: row {row.id} has no pass_rate, which {asked_by} needs. Measure them: lockstep data "
            f"pass-rates POLICY --data {row.source} --out FILE, and train on that FILE"
        )
    return row.pass_rate
