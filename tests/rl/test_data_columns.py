"""The columns of a record that are neither problem nor answer: what a reward function sees of them."""

import datetime

import pytest

from rl.data_columns import parse_record


def test_other_columns_are_kept_as_json_values() -> None:
    record = {
        "id": 5,
        "problem": "P",
        "answer": "7",
        "solution": "so \\boxed{7}",
        "level": 3,
        "tags": ["algebra", None],
        "seen": datetime.date(2026, 11, 21),
    }
    assert parse_record(record, "mine.jsonl", 1).columns == {
        "solution": "so \\boxed{7}",
        "level": 3,
        "tags": ["algebra", None],
        "seen": "2026-11-21",
    }


def test_a_record_without_other_columns_has_none() -> None:
    assert parse_record({"question": "P", "ground_truth": 7}, "mine.jsonl", 1).columns == {}


def test_rows_that_differ_in_other_columns_are_equal() -> None:
    """A data set may hold a problem many times, each under another number."""
    rows = [parse_record({"id": "a", "problem": "P", "answer": 7, "index": n}, "mine.jsonl", n) for n in (1, 2)]
    assert rows[0] == rows[1] and rows[0].columns != rows[1].columns


def test_a_column_that_is_nested_too_deeply_makes_a_bad_row() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_record({"problem": "P", "answer": 7, "deep": deep}, "mine.jsonl", 1)


TURNS = [{"role": "system", "content": " S\n"}, {"role": "user", "content": "Q ", "name": None}]


@pytest.mark.parametrize("column", ["problem", "question", "prompt"])
def test_a_chat_keeps_its_messages_word_for_word(column: str) -> None:
    row = parse_record({column: TURNS, "answer": 7}, "mine.jsonl", 1)
    assert (row.problem, row.messages) == ("Q", (("system", " S\n"), ("user", "Q ")))
    assert parse_record({"problem": "Q", "prompt": TURNS, "answer": 7}, "mine.jsonl", 1) == row
    assert parse_record({column: "Q", "answer": 7}, "mine.jsonl", 1).messages == ()


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "assistant", "content": None}, "message 1 needs a role and a content in plain text, got {"),
        ({"content": "x"}, "message 1 needs a role and a content in plain text"),
        ({"role": "tool", "content": "x", "tool_calls": [1]}, "message 1 also has tool_calls; only role and content"),
    ],
)
def test_a_message_that_cannot_be_rendered_makes_a_bad_row(turn: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^column prompt: {reason}"):
        parse_record({"prompt": [turn, *TURNS], "answer": 7}, "mine.jsonl", 1)
