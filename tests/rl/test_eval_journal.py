"""The journal of an evaluation: what is finished survives, whatever ended the process that wrote it."""

import json
from pathlib import Path

import pytest

from rl.eval_journal import completions_path, open_journal
from rl.eval_problem import ProblemResult
from tests.rl.graded import graded, problem

IDENTITY = {"seed": 0, "temperature": 0.6}
PROBLEMS = [problem(index, graded("3", correct=True, text=f"text {index}"), graded(None)) for index in range(3)]


def journal_of(json_file: Path) -> Path:
    return json_file.with_name("result.partial.jsonl")


@pytest.fixture
def json_file(tmp_path: Path) -> Path:
    """Where the result will be; beside it, a journal with problems 2 and 0."""
    with open_journal(tmp_path / "result.json", IDENTITY) as journal:
        assert journal.problems == {}
        journal.append(PROBLEMS[2])
        journal.append(PROBLEMS[0])
    return tmp_path / "result.json"


def test_what_was_finished_is_there_again_without_its_texts(json_file: Path) -> None:
    with open_journal(json_file, IDENTITY) as journal:
        assert journal.problems == {2: PROBLEMS[2].without_texts(), 0: PROBLEMS[0].without_texts()}
        journal.append(PROBLEMS[1])
    with open_journal(json_file, IDENTITY) as journal:
        assert list(journal.problems) == [2, 0, 1]


def test_a_finished_journal_becomes_the_completions_in_order(json_file: Path) -> None:
    with open_journal(json_file, IDENTITY) as journal:
        journal.append(PROBLEMS[1])
        journal.finish(completions_path(json_file))
    assert [path.name for path in json_file.parent.iterdir()] == ["result.completions.jsonl"]
    lines = completions_path(json_file).read_text().splitlines()
    assert [ProblemResult.from_json(json.loads(line)) for line in lines] == PROBLEMS


def test_a_torn_last_line_is_cut_off(json_file: Path) -> None:
    path = journal_of(json_file)
    whole = path.read_bytes()
    for torn in range(1, 80):
        path.write_bytes(whole[:-torn])
        with open_journal(json_file, IDENTITY) as journal:
            assert list(journal.problems) == [2]
            journal.append(PROBLEMS[0])
        assert path.read_bytes() == whole


def test_a_torn_first_line_begins_anew(json_file: Path) -> None:
    journal_of(json_file).write_bytes(b'{"seed": 0')
    with open_journal(json_file, IDENTITY) as journal:
        assert journal.problems == {}
    assert journal_of(json_file).read_bytes() == b'{"seed": 0, "temperature": 0.6}\n'


def test_another_evaluation_is_not_continued(json_file: Path) -> None:
    before = journal_of(json_file).read_bytes()
    changed = {"seed": 1, "temperature": 0.6, "top_p": 0.9}
    with pytest.raises(ValueError) as error, open_journal(json_file, changed):
        pass
    assert "another evaluation: seed 0 there, 1 now; top_p None there, 0.9 now" in str(error.value)
    assert "Remove it" in str(error.value)
    assert journal_of(json_file).read_bytes() == before


@pytest.mark.parametrize("line", [b"\xff\n", b"{}\n", b"[]\n", b'{"row": {}, "index": 1, "completions": [{}]}\n'])
def test_a_damaged_line_is_named(json_file: Path, line: bytes) -> None:
    path = journal_of(json_file)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ValueError, match=f"is damaged at byte {size} .*; remove it"), open_journal(json_file, IDENTITY):
        pass


@pytest.mark.parametrize("line", [b"5\n", b"not JSON\n"])
def test_a_damaged_first_line_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "result.partial.jsonl").write_bytes(line)
    with (
        pytest.raises(ValueError, match=r"is damaged at byte 0 .*; remove it"),
        open_journal(tmp_path / "result.json", IDENTITY),
    ):
        pass


def test_two_processes_do_not_write_one_journal(json_file: Path) -> None:
    with (
        open_journal(json_file, IDENTITY),
        pytest.raises(ValueError, match="another process writes"),
        open_journal(json_file, IDENTITY),
    ):
        pass
