"""Problem sets in every accepted shape, and every way in which a row or a file can be bad."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.data_columns import Row
from rl.data_sources import BadRow, load_rows

AIME = {"id": 60, "problem": "Find $m+n$ where $\\frac{m}{n}$ is reduced.", "answer": "204"}
GSM8K = {"question": "How much?", "answer": "She sells 16 - 3 - 4 = <<16-3-4=9>>9.\nSo 9*2.\n#### 1,018"}
CHAT = [
    {"role": "system", "content": "Think."},
    {"role": "user", "content": "First?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Second?"},
]
MESSAGES = tuple((turn["role"], turn["content"]) for turn in CHAT)


def _file(folder: Path, *lines: object, name: str = "rows.jsonl") -> str:
    path = folder / name
    encoded = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"\n".join(encoded))
    return str(path)


GOOD: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "aime": (AIME, "60", "Find $m+n$ where $\\frac{m}{n}$ is reduced.", "204"),
    "gsm8k": (GSM8K, "1", "How much?", "1,018"),
    "integer": ({"problem": "P", "answer": 7}, "1", "P", "7"),
    "zero": ({"problem": "P", "answer": 0}, "1", "P", "0"),
    "float": ({"problem": "P", "answer": 204.0}, "1", "P", "204"),
    "fraction": ({"problem": "P", "answer": 0.5}, "1", "P", "0.5"),
    "chat": ({"prompt": CHAT, "ground_truth": "5"}, "1", "Second?", "5"),
    "verl": ({"prompt": "P", "reward_model": {"style": "rule", "ground_truth": "34"}}, "1", "P", "34"),
    "verl as text": ({"prompt": "P", "reward_model": '{"ground_truth": 34}'}, "1", "P", "34"),
    "boxed": ({"problem": "P", "solution": "\\boxed{1}, so \\boxed{\\frac{1}{2}}."}, "1", "P", "\\frac{1}{2}"),
    "nulls": ({"id": None, "problem": "P", "question": None, "answer": None, "ground_truth": "3"}, "1", "P", "3"),
    "same twice": ({"problem": "P", "question": "P", "answer": "025", "ground_truth": 25}, "1", "P", "025"),
    "solution agrees": ({"problem": "P", "answer": "25", "solution": "\\boxed{025}"}, "1", "P", "25"),
    "solution otherwise written": ({"problem": "P", "answer": "1/2", "solution": "\\boxed{0.5}"}, "1", "P", "1/2"),
    "solution without box": ({"problem": "P", "answer": "25", "solution": "by hand"}, "1", "P", "25"),
    "spaces around": ({"problem": " P \n", "answer": " 7 "}, "1", "P", "7"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_row(name: str, tmp_path: Path) -> None:
    record, id_, problem, answer = GOOD[name]
    source = _file(tmp_path, record)
    assert load_rows(source) == ([Row(id_, problem, answer, source, MESSAGES if name == "chat" else ())], [])


BAD = {
    "not json": (b'{"problem": "P",, "answer": 1}', "not JSON: Expecting property name"),
    "cut short": (b'{"problem": "P"', "not JSON: Expecting ',' delimiter at character 16"),
    "list": ([1, 2], "not an object with named columns but [1, 2]"),
    "nan": (b'{"problem": "P", "answer": NaN}', "NaN is not a JSON value"),
    "infinity": (b'{"problem": "P", "answer": -Infinity}', "-Infinity is not a JSON value"),
    "not utf-8": (b'{"problem": "\xff", "answer": 1}', "not UTF-8: byte 0xff at position 13"),
    "half a pair": (b'{"problem": "\\ud800", "answer": 1}', "column problem holds half a surrogate pair"),
    "key twice": (b'{"problem": "P", "answer": 1, "answer": 2}', "key 'answer' occurs twice in one object"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "no problem": ({"answer": "1"}, "no problem: none of the columns problem, question, prompt holds a value"),
    "no answer": ({"problem": "P"}, "no answer: none of the columns answer, ground_truth, reward_model.ground_truth"),
    "empty problem": ({"problem": " \n", "answer": "1"}, "column problem is empty"),
    "empty answer": ({"problem": "P", "answer": ""}, "column answer is empty"),
    "true": ({"problem": "P", "answer": True}, "column answer must be text or a number, got True"),
    "list answer": ({"problem": "P", "answer": ["1"]}, "column answer must be text or a number, got ['1']"),
    "number problem": (
        {"problem": 5, "answer": "1"},
        "column problem must be text or a list of {role, content}, got 5",
    ),
    "two problems": ({"problem": "P", "question": "Q", "answer": "1"}, "columns problem and question hold different"),
    "two answers": (
        {"problem": "P", "answer": "1", "ground_truth": "2"},
        "the columns hold different answers: answer '1', ground_truth '2'",
    ),
    "solution disagrees": (
        {"problem": "P", "answer": "1", "solution": "\\boxed{2}"},
        "the columns hold different answers: answer '1', solution '2'",
    ),
    "no user": ({"prompt": CHAT[:1], "answer": "1"}, "column prompt is a chat without a user message in plain text"),
    "images": ({"prompt": [{"role": "user", "content": [{}]}], "answer": "1"}, "column prompt is a chat without"),
    "nothing after hashes": ({"question": "Q", "answer": "so\n#### "}, "column answer has nothing after its last ####"),
    "no box": ({"problem": "P", "solution": "by hand"}, "column solution has no \\boxed{} answer"),
    "open box": ({"problem": "P", "solution": "\\boxed{1"}, "column solution has no \\boxed{} answer"),
    "reward_model text": ({"problem": "P", "reward_model": "rule"}, "not JSON: Expecting value"),
    "reward_model list": (
        {"problem": "P", "reward_model": "[1]"},
        "column reward_model must be an object or JSON text",
    ),
    "reward_model without": ({"problem": "P", "reward_model": {"style": "rule"}}, "no answer: none of the columns"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_reported_with_its_line_and_costs_no_other(name: str, tmp_path: Path) -> None:
    record, reason = BAD[name]
    source = _file(tmp_path, AIME, b"", record, GSM8K)
    rows, bad = load_rows(source)
    assert [row.answer for row in rows] == ["204", "1,018"]
    assert [(row.source, row.line) for row in bad] == [(source, 3)]
    assert reason in bad[0].reason


def test_same_id_twice_is_bad(tmp_path: Path) -> None:
    rows, bad = load_rows(_file(tmp_path, AIME, AIME))
    assert len(rows) == 1
    assert bad[0].line == 2 and bad[0].reason.startswith("id '60' is taken by an earlier row")


def test_windows_file_loads(tmp_path: Path) -> None:
    source = _file(tmp_path, b"\xef\xbb\xbf" + json.dumps(AIME).encode() + b"\r", b"\r", b"")
    assert [row.id for row in load_rows(source)[0]] == ["60"]


def test_text_keeps_characters_that_look_like_line_ends(tmp_path: Path) -> None:
    source = _file(tmp_path, '{"problem": "a\u2028b\x85c", "answer": "1"}'.encode())
    assert load_rows(source)[0][0].problem == "a\u2028b\x85c"


@given(st.binary(max_size=200))
def test_any_bytes_give_rows_or_reasons(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    rows, bad = load_rows(str(path))
    assert len(rows) + len(bad) == sum(bool(line.strip()) for line in data.split(b"\n"))


def test_json_list(tmp_path: Path) -> None:
    source = _file(tmp_path, [AIME, {"problem": "P"}, GSM8K], name="rows.json")
    rows, bad = load_rows(source)
    assert [row.id for row in rows] == ["60", "3"]
    assert [row.line for row in bad] == [2]


@pytest.mark.parametrize(
    ("content", "message"),
    [(AIME, "must be a list of objects"), (b"[1,", "not JSON: Expecting value at character 4 "), (b"", "not JSON")],
)
def test_json_that_is_no_list(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_rows(_file(tmp_path, content, name="rows.json"))


def test_parquet(tmp_path: Path) -> None:
    source = str(tmp_path / "rows.parquet")
    columns = {
        "prompt": [CHAT, CHAT[:2], CHAT],
        "reward_model": [{"ground_truth": "1"}, {"ground_truth": "2"}, None],
        "answer": [1.0, None, math.nan],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), source)
    rows, bad = load_rows(source)
    assert rows == [Row("1", "Second?", "1", source, MESSAGES), Row("2", "First?", "2", source, MESSAGES[:2])]
    assert bad == [BadRow(source, 3, "column answer must be text or a number, got nan")]


def test_parquet_that_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.parquet: cannot be read as Parquet"):
        load_rows(_file(tmp_path, b"PAR?", name="rows.parquet"))


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    _file(tmp_path, AIME, name="aime24.jsonl")
    with pytest.raises(ValueError, match=r"aime42\.jsonl: no such file; did you mean .*aime24\.jsonl\?"):
        load_rows(str(tmp_path / "aime42.jsonl"))
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        load_rows(str(tmp_path / "nowhere" / "aime24.jsonl"))


def test_other_file_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"suffix '\.csv' is not one of \.jsonl, \.json, \.parquet"):
        load_rows(_file(tmp_path, b"problem,answer", name="rows.csv"))


def test_dataset_that_cannot_be_reached() -> None:
    """The tests run offline, so this is the real failure of the real library."""
    with pytest.raises(ValueError, match=r"'no/such:test' is neither .*nor a Hugging Face dataset .*download it first"):
        load_rows("no/such:test")


@pytest.mark.parametrize(("source", "split"), [("org/math", "train"), ("org/math:test[:5%]", "test[:5%]")])
def test_dataset_by_name(source: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list([AIME])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows(source) == ([Row("60", str(AIME["problem"]), "204", source)], [])
    assert asked == [("org/math", split)]


def test_pass_rate_column(tmp_path: Path) -> None:
    records = [{"problem": "P", "answer": 1, "pass_rate": rate} for rate in (0, 0.25, 1, None)]
    rows, bad = load_rows(_file(tmp_path, *records))
    assert ([row.pass_rate for row in rows], bad) == ([0.0, 0.25, 1.0, None], [])


@pytest.mark.parametrize("rate", [1.5, -0.1, "0.5", True])
def test_pass_rate_that_is_none(rate: object, tmp_path: Path) -> None:
    rows, bad = load_rows(_file(tmp_path, {"problem": "P", "answer": 1, "pass_rate": rate}))
    assert rows == [] and bad[0].reason == f"column pass_rate must be a number from 0 to 1, got {rate!r}"
