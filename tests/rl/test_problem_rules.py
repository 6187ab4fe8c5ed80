"""Rules of the data section, alone and together: what they leave, what they say, what they refuse."""

import pytest

from policy.tokenizer import train_tokenizer
from rl.data_columns import Row
from rl.data_config import DataConfig
from rl.problem_rules import select_problems

# A byte is a token: nothing is frequent enough in this text to be merged.
TOKENIZER = train_tokenizer(["a"], 257)
LONG = "A farmer has 12 cows and 7 hens, sells 3 cows at noon and buys as many hens as legs were sold. How many hens?"


def _rows(*problems: str, source: str = "a", answer: str = "1", pass_rate: float | None = None) -> list[Row]:
    return [Row(str(number), problem, answer, source, pass_rate=pass_rate) for number, problem in enumerate(problems)]


def _select(rows: list[Row], held_out: list[Row] | None = None, **config: object) -> tuple[list[str], list[str]]:
    """The problems that are left, and the lines that say why."""
    settings = DataConfig.model_validate({"train": "a", "prompt_template": "{problem}\n", **config})
    kept, lines = select_problems(rows, held_out or [], settings, TOKENIZER)
    return [row.problem for row in kept], lines


def test_by_default_nothing_is_left_out_and_nothing_said() -> None:
    assert _select(_rows("P", "P", LONG), _rows("Q")) == (["P", "P", LONG], [])


def test_duplicates_go_and_contradictions_are_said() -> None:
    rows = [*_rows("Sum of 1 and 2?", "Sum of 3 and 4?"), Row("9", "sum of $1$ and $2$", "3", "a")]
    assert _select(rows, deduplicate="exact") == (
        ["Sum of 1 and 2?", "Sum of 3 and 4?"],
        ["1 of 3 training problems left out by data.deduplicate; 1 of them repeat a problem with another answer"],
    )
    near = _rows(LONG, LONG.replace("farmer", "baker"))
    assert _select(near, deduplicate="exact") == ([near[0].problem, near[1].problem], [])
    assert _select(near, deduplicate="near") == (
        [LONG],
        ["1 of 2 training problems left out by data.deduplicate"],
    )


def test_filters_say_how_many_each_left_out() -> None:
    rows = _rows("p", "pp", "ppp", "pppp")
    assert _select(rows, filters={"problem_chars": [0, 3], "prompt_tokens": [3, 9]}) == (
        ["pp", "ppp"],
        [
            "1 of 4 training problems left out by data.filters.problem_chars",
            "1 of 4 training problems left out by data.filters.prompt_tokens",
        ],
    )


def test_prompt_tokens_count_the_template() -> None:
    filters = {"prompt_tokens": [1, 4]}
    assert _select(_rows("pp", "ppp"), prompt_template="Q{problem}\n", filters=filters)[0] == ["pp"]


def test_a_source_of_which_nothing_is_left_is_refused() -> None:
    rows = [*_rows("p", "pp"), *_rows("pppp", source="b")]
    with pytest.raises(ValueError) as error:
        _select(rows, train=["a", "b"], filters={"problem_chars": [3, 9]})
    assert str(error.value) == (
        "a: no training problem is left; relax the rules: 2 of 3 training problems left out by "
        "data.filters.problem_chars"
    )


FOUND = "1 training problems hold 1 of the evaluation problems\n  a:1 holds 100% of e:0: "


def test_contamination_is_warned_of_dropped_refused_or_let_be() -> None:
    rows, held_out = _rows("P", f"Question: {LONG}"), _rows(LONG, source="e")
    kept, (line,) = _select(rows, held_out)
    assert len(kept) == 2 and line.startswith(f"warning: {FOUND}") and "data.contamination=drop" in line
    kept, (line,) = _select(rows, held_out, contamination="drop")
    assert kept == ["P"] and line.startswith(f"left out: {FOUND}")
    assert _select(rows, held_out, contamination="off") == ([row.problem for row in rows], [])
    with pytest.raises(ValueError) as error:
        _select(rows, held_out, contamination="refuse")
    assert str(error.value).startswith(FOUND) and "Leave them out with data.contamination=drop" in str(error.value)


def test_what_a_rule_left_out_is_looked_at_by_no_later_one() -> None:
    """The contaminated row is filtered before anyone could refuse it, and the duplicate before it is counted twice."""
    rows = [*_rows("short 1", "short 1"), *_rows(LONG, source="a")]
    kept, lines = _select(
        rows,
        _rows(LONG, source="e"),
        deduplicate="exact",
        filters={"problem_chars": [0, 20]},
        contamination="refuse",
    )
    assert kept == ["short 1"] and len(lines) == 2


def test_equal_ids_in_two_sources_are_two_rows() -> None:
    rows = [Row("0", "P", "1", "a"), Row("0", LONG, "1", "b"), Row("1", "R", "1", "b")]
    kept, _ = _select(rows, _rows(LONG), train=["a", "b"], contamination="drop")
    assert kept == ["P", "R"]
