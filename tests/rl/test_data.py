"""The problems of a run: read from one source or several, refused as a whole for one bad row, reported, written."""

import json
import logging
from pathlib import Path

import pytest

from rl.data import check_report, load_problems, source_labels, source_of, write_jsonl
from rl.data_columns import Row
from rl.data_config import DataConfig
from rl.data_sources import load_rows
from rl.problems import FAMILIES, generate

AIME = {"id": 60, "problem": "Find $m+n$ where $\\frac{m}{n}$ is reduced.", "answer": "204"}
GSM8K = {"question": "How much?", "answer": "She sells 16 - 3 - 4 = <<16-3-4=9>>9.\nSo 9*2.\n#### 1,018"}


def _file(folder: Path, *records: object, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


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
        load_problems(DataConfig(train=_file(tmp_path)), "train", seed=0)


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
    assert lines[1] == "problems: 3 distinct, 0 of them nearly the same as another; longest 42 characters"
    assert lines[2] == "answers: 2 integer, 1 integer_0_999, 1 fraction"
    assert "id 60" in lines[3]
    assert [line.split(": ")[0] for line in lines[4:]] == [f"{source}:{number}" for number in (4, 5, 6, 7)]


def test_several_sources_come_one_after_the_other(tmp_path: Path) -> None:
    first, second = _file(tmp_path, AIME, name="a.jsonl"), _file(tmp_path, GSM8K, name="b.jsonl")
    config = DataConfig(train=[first, {"source": "synthetic", "weight": 3}, second], train_size=2)
    rows = load_problems(config, "train", seed=0)
    assert [source_of(row) for row in rows] == [first, "synthetic", "synthetic", second]
    assert [rows[0].answer, rows[3].answer] == ["204", "1,018"]


def test_a_bad_row_in_any_source_is_refused(tmp_path: Path) -> None:
    good, bad = _file(tmp_path, AIME, name="a.jsonl"), _file(tmp_path, AIME, {"problem": "P"}, name="b.jsonl")
    with pytest.raises(ValueError, match=r"1 of 2 rows cannot be used .*b\.jsonl"):
        load_problems(DataConfig(train=[good, bad]), "train", seed=0)


def test_check_report_counts_repeats(tmp_path: Path) -> None:
    near = [{"problem": f"Find the sum of all the digits of the number 2{end}", "answer": 2} for end in (".", " now!")]
    source = _file(tmp_path, *near, near[0] | {"problem": near[0]["problem"].upper()})
    assert "problems: 2 distinct, 1 of them nearly the same as another;" in check_report(source, *load_rows(source))


def test_labels_are_short_unless_they_would_be_the_same() -> None:
    sources = ["synthetic", "gsm8k:train@/copies/gsm8k", "data/my.set.jsonl", "org/math:test"]
    assert source_labels(sources) == ["synthetic", "gsm8k:train", "my.set", "math:test"]
    assert source_labels(["a/set.jsonl", "b/set.jsonl"]) == ["a/set.jsonl", "b/set.jsonl"]
