"""Data sets in every accepted shape, every way a row or file can be bad, and the order of prompts."""

import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.data import BadRow, PromptOrder, Row, check_report, load_problems, load_rows, write_jsonl
from rl.data_config import DataConfig
from rl.problems import FAMILIES, generate

AIME = {"id": 60, "problem": "Find $m+n$ where $\\frac{m}{n}$ is reduced.", "answer": "204"}
GSM8K = {"question": "How much?", "answer": "She sells 16 - 3 - 4 = <<16-3-4=9>>9.\nSo 9*2.\n#### 1,018"}
CHAT = [
    {"role": "system", "content": "Think."},
    {"role": "user", "content": "First?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Second?"},
]


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
    assert load_rows(source) == ([Row(id_, problem, answer, source)], [])


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
    with pytest.raises(ValueError, match="1 of 3 rows cannot be used"):
        load_problems(DataConfig(train=source), "train", seed=0)


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
    assert rows == [Row("1", "Second?", "1", source), Row("2", "First?", "2", source)]
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


def test_load_problems_shows_the_first_bad_rows_and_the_way_to_all(tmp_path: Path) -> None:
    source = _file(tmp_path, AIME, *[{"problem": "P"}] * 5)
    with pytest.raises(ValueError) as caught:
        load_problems(DataConfig(eval=source), "eval", seed=0)
    first, *shown = str(caught.value).split("\n")
    assert first == f"5 of 6 rows cannot be used (run `lockstep data check {source}` for all):"
    assert [line.strip().startswith(f"{source}:{number}: no answer") for number, line in enumerate(shown, 2)] == [
        True
    ] * 3


def test_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows; a data set needs at least one"):
        load_problems(DataConfig(train=_file(tmp_path, b"\n\n")), "train", seed=0)


def test_eval_takes_the_first_rows_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = _file(tmp_path, *[{"problem": f"P{number}", "answer": number} for number in range(5)])
    config = DataConfig(train=source, eval=source, eval_size=2, train_size=1)
    with caplog.at_level(logging.WARNING):
        assert [row.answer for row in load_problems(config, "train", seed=0)] == list("01234")
        assert caplog.messages == []
        assert [row.answer for row in load_problems(config, "eval", seed=0)] == ["0", "1"]
    assert caplog.messages == [f"evaluating on the first 2 of 5 rows of {source}"]


def test_synthetic_problems_become_rows() -> None:
    config = DataConfig(train_size=8, eval_size=4, difficulty=2, families=("counting",))
    train, held_out = (load_problems(config, split, seed=3) for split in ("train", "eval"))
    assert [row.id for row in train] == [each.id for each in generate("train", 8, 3, 2, ["counting"])]
    assert len(held_out) == 4 and {row.source for row in train + held_out} == {"synthetic/counting"}


def test_written_problems_load_back(tmp_path: Path) -> None:
    problems = generate("train", 40, 0, 3, FAMILIES)
    path = tmp_path / "made.jsonl"
    write_jsonl(problems, path)
    assert load_rows(str(path)) == ([Row(each.id, each.problem, each.answer, str(path)) for each in problems], [])
    with pytest.raises(ValueError, match=r"nowhere.made\.jsonl: cannot be written: No such file"):
        write_jsonl(problems, tmp_path / "nowhere" / "made.jsonl")


def test_check_report_lists_every_bad_row(tmp_path: Path) -> None:
    source = _file(tmp_path, AIME, GSM8K, {"problem": "P", "answer": "1/2"}, *[{"problem": "P"}] * 4)
    lines = check_report(source, *load_rows(source)).split("\n")
    assert lines[0] == f"{source}: 3 good rows, 4 bad"
    assert lines[1] == "problems: 3 distinct, longest 42 characters"
    assert lines[2] == "answers: 2 whole numbers, 1 others"
    assert "id 60" in lines[3]
    assert [line.split(": ")[0] for line in lines[4:]] == [f"{source}:{number}" for number in (4, 5, 6, 7)]


def test_config_refuses_bad_values() -> None:
    for fields, message in [
        ({"prompt_template": "Solve."}, r"prompt_template = 'Solve\.': must contain \{problem\} exactly once"),
        ({"families": ["geometry"]}, r"families = \['geometry'\]: give one or more of remainder"),
        ({"difficulty": 4}, "less than or equal to 3"),
        ({"trian": "synthetic"}, "Extra inputs"),
    ]:
        with pytest.raises(pydantic.ValidationError, match=message):
            DataConfig.model_validate(fields)


def test_every_config_field_is_described() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())


def test_prompt_keeps_other_braces() -> None:
    config = DataConfig(prompt_template="{problem} Answer in \\boxed{}.")
    assert config.prompt("Is {problem} a set?") == "Is {problem} a set? Answer in \\boxed{}."


def _taken(num_rows: int, prompts_per_step: int, steps: int, seed: int = 0) -> list[list[int]]:
    order = PromptOrder(num_rows, seed)
    return [order.batch(step, prompts_per_step) for step in range(steps)]


@given(num_rows=st.integers(1, 40), prompts_per_step=st.integers(1, 50), seed=st.integers(0, 9))
def test_order_covers_every_epoch_without_duplicates_in_a_step(num_rows: int, prompts_per_step: int, seed: int) -> None:
    batches = _taken(num_rows, prompts_per_step, steps=12, seed=seed)
    assert {len(batch) for batch in batches} == {prompts_per_step}
    if prompts_per_step <= num_rows:
        assert all(len(set(batch)) == prompts_per_step for batch in batches)
    taken = [row for batch in batches for row in batch]
    for start in range(0, len(taken) - num_rows + 1, num_rows):
        assert sorted(taken[start : start + num_rows]) == list(range(num_rows))


def test_order_needs_no_history() -> None:
    assert PromptOrder(50, 1).batch(1000, 32) == PromptOrder(50, 1).batch(1000, 32)
    assert PromptOrder(100, 1).batch(1000, 32) == _taken(100, 32, 1001, seed=1)[1000]


def test_order_differs_by_seed_and_epoch() -> None:
    first, second = _taken(32, 32, 2)
    assert first != second and first != list(range(32))
    assert first != _taken(32, 32, 1, seed=1)[0]


def test_order_repair_leaves_a_fair_mix() -> None:
    """Row 0 of 5 rows in steps of 3 is asked as often as any other, and comes in every place of a step."""
    batches = _taken(5, 3, 1000)
    assert Counter(row for batch in batches for row in batch) == dict.fromkeys(range(5), 600)
    assert all(abs(count - 200) < 60 for count in Counter(batch.index(0) for batch in batches if 0 in batch).values())
