"""Kinds of answer by example, and what each filter lets through, at its bounds."""

import pytest

from rl.data_columns import Row
from rl.data_config import FilterConfig
from rl.data_filters import answer_types, filter_rows


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        ("0", {"integer", "integer_0_999"}),
        ("073", {"integer", "integer_0_999"}),
        ("$999$", {"integer", "integer_0_999"}),
        ("1000", {"integer"}),
        ("1,018", {"integer"}),
        ("-7", {"integer"}),
        ("0.5", {"decimal"}),
        ("-.25", {"decimal"}),
        ("1/2", {"fraction"}),
        ("\\frac{-1}{2}", {"fraction"}),
        ("\\dfrac12", {"fraction"}),
        ("-\\frac{3}{4}", {"fraction"}),
        ("C", {"choice"}),
        ("(B)", {"choice"}),
        ("\\text{(E)}", {"choice"}),
        ("x", {"expression"}),
        ("K", {"expression"}),
        ("\\frac{\\pi}{2}", {"expression"}),
        ("1/x", {"expression"}),
        ("(1,2)", {"expression"}),
        ("3\\sqrt{2}", {"expression"}),
        ("50\\%", {"expression"}),
    ],
)
def test_answer_types(answer: str, kinds: set[str]) -> None:
    assert answer_types(answer) == kinds


def _row(problem: str = "P", answer: str = "1", pass_rate: float | None = None) -> Row:
    return Row("7", problem, answer, "rows.jsonl", pass_rate=pass_rate)


def test_no_filter_lets_everything_through() -> None:
    rows = [_row(), _row(pass_rate=0.0)]
    assert filter_rows(rows, FilterConfig()) == (rows, {})


def test_bounds_are_let_through() -> None:
    rows = [_row("p" * length) for length in (1, 2, 3, 4)]
    kept, dropped = filter_rows(rows, FilterConfig(problem_chars=(2, 3)))
    assert ([len(row.problem) for row in kept], dropped) == ([2, 3], {"problem_chars": 2})
    rows = [_row(pass_rate=rate) for rate in (0.0, 0.125, 0.5, 0.875, 1.0)]
    kept, dropped = filter_rows(rows, FilterConfig(pass_rate=(0.125, 0.875)))
    assert ([row.pass_rate for row in kept], dropped) == ([0.125, 0.5, 0.875], {"pass_rate": 2})


def test_a_row_passes_if_any_of_its_kinds_is_wanted() -> None:
    rows = [_row(answer=answer) for answer in ("5", "5000", "1/2", "x")]
    kept, _ = filter_rows(rows, FilterConfig(answer_types=("integer_0_999", "fraction")))
    assert [row.answer for row in kept] == ["5", "1/2"]
    kept, dropped = filter_rows(rows, FilterConfig(answer_types=("integer",)))
    assert ([row.answer for row in kept], dropped) == (["5", "5000"], {"answer_types": 2})


def test_a_row_is_counted_for_the_first_filter_that_objects() -> None:
    rows = [_row("pp", "x", 0.0), _row("p", "x", 0.0), _row("p", "1", 0.0), _row("p", "1", 1.0)]
    config = FilterConfig(problem_chars=(0, 1), answer_types=("integer",), pass_rate=(0.5, 1.0))
    kept, dropped = filter_rows(rows, config)
    assert kept == rows[3:]
    assert dropped == {"problem_chars": 1, "answer_types": 1, "pass_rate": 1}


def test_a_missing_pass_rate_is_said_with_the_way_to_it() -> None:
    with pytest.raises(ValueError) as error:
        filter_rows([_row(pass_rate=0.5), _row()], FilterConfig(pass_rate=(0, 1)))
    assert str(error.value) == (
        "rows.jsonl: row 7 has no pass_rate, which data.filters.pass_rate needs. Measure them: lockstep data "
        "pass-rates POLICY --data rows.jsonl --out FILE, and train on that FILE"
    )
