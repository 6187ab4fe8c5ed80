"""The datasets with a short name, on small local copies that have the columns of the real ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console

from rl.data_sources import load_rows
from rl.known_datasets import KNOWN, known_source, known_table, training_split

DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nFind $x$.\n\nWhat is it?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"content": DAPO_PROMPT, "role": "user"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
}
OLYMPIAD = {
    "id": 1606,
    "question": "Find all $x$.",
    "solution": ["Let $x = 2$."],
    "final_answer": ["$2$,$-\\frac{1}{2}$"],
    "context": None,
    "image_1": None,
    "is_multiple_answer": True,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
    "subfield": "Algebra",
}
# (records as on the hub, id, problem and answer of the first)
SHAPES: dict[str, tuple[list[dict[str, Any]], str, str, str]] = {
    "aime24": (
        # Its solutions end in remarks: the last box is not always the answer.
        [
            {
                "id": 60,
                "problem": "P",
                "solution": "\\boxed{204} or \\boxed{7}",
                "answer": "025",
                "url": "u",
                "year": "2024",
            }
        ],
        "60",
        "P",
        "025",
    ),
    "aime25": ([{"problem": "P", "answer": "336^\\circ", "id": "18"}], "18", "P", "336"),
    "math500": (
        [
            {
                "problem": "P",
                "solution": "so $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.$",
                "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
                "subject": "Precalculus",
                "level": 2,
                "unique_id": "test/precalculus/807.json",
            }
        ],
        "test/precalculus/807.json",
        "P",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
    ),
    "gsm8k": ([{"question": "P", "answer": "2*<<2*509=1018>>509.\n#### 1,018"}], "1", "P", "1,018"),
    "dapo-math-17k": ([DAPO] * 3, DAPO["extra_info"]["index"], "Find $x$.\n\nWhat is it?", "34"),
    "olympiadbench": ([OLYMPIAD], "1606", "Find all $x$.", "2,-\\frac{1}{2}"),
    "amc23": ([{"id": 0, "question": "P", "answer": "27.0", "url": "u"}], "0", "P", "27"),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def _clone(folder: Path, name: str, splits: Mapping[str, list[dict[str, Any]]]) -> Path:
    """A clone of the repository: Parquet files, and a README that says which is which split of which subset."""
    lines = ["---", "configs:", f"- config_name: {KNOWN[name].subset or 'default'}", "  data_files:"]
    for split, records in splits.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(records).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        lines += [f"  - split: {split}", f"    path: data/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def test_every_known_dataset_has_a_shape_here() -> None:
    assert list(SHAPES) == list(KNOWN)


@pytest.mark.parametrize("name", SHAPES)
def test_clone_of_the_repository(name: str, tmp_path: Path) -> None:
    records, id_, problem, answer = SHAPES[name]
    source = f"{name}@{_clone(tmp_path / 'copy', name, {KNOWN[name].splits[0]: records})}"
    (row,), bad = load_rows(source)
    assert (row.id, row.problem, row.answer, row.source, bad) == (id_, problem, answer, source, [])


@pytest.mark.parametrize("name", SHAPES)
def test_file(name: str, tmp_path: Path) -> None:
    records, id_, problem, answer = SHAPES[name]
    path = tmp_path / "copy.parquet"
    datasets.Dataset.from_list(records).to_parquet(path)
    (row,), bad = load_rows(f"{name}@{path}")
    assert (row.id, row.problem, row.answer, bad) == (id_, problem, answer, [])


def test_split_is_that_of_the_use_unless_it_is_named(tmp_path: Path) -> None:
    records = {split: [{"question": f"{split}?", "answer": "#### 1"}] for split in ("train", "test")}
    folder = _clone(tmp_path / "copy", "gsm8k", records)
    assert load_rows(f"gsm8k@{folder}")[0][0].problem == "train?"
    assert load_rows(f"gsm8k@{folder}", "eval")[0][0].problem == "test?"
    assert load_rows(f"gsm8k:test@{folder}", "train")[0][0].problem == "test?"
    with pytest.raises(ValueError, match="no split 'validation' of gsm8k; found train, test"):
        load_rows(f"gsm8k:validation@{folder}")
    assert training_split(f"gsm8k@{folder}") == f"gsm8k:train@{folder}"
    assert training_split("gsm8k:test") == "gsm8k:test" and training_split("my.jsonl") == "my.jsonl"


def test_training_never_takes_the_only_split_there_is_if_it_is_the_test(tmp_path: Path) -> None:
    folder = _clone(tmp_path / "copy", "gsm8k", {"test": [{"question": "P", "answer": "#### 1"}]})
    with pytest.raises(ValueError, match="no split 'train' of gsm8k; found test"):
        load_rows(f"gsm8k@{folder}")


def test_folder_of_one_file_with_another_name(tmp_path: Path) -> None:
    """The dataset has one split, so there is nothing to confuse."""
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "aime2025.jsonl").write_text('{"problem": "P", "answer": "70", "id": "0"}\n')
    assert load_rows(f"aime25@{tmp_path / 'copy'}")[0][0].answer == "70"


def test_folder_of_subsets_without_a_readme(tmp_path: Path) -> None:
    for subset in ("main", "socratic"):
        (tmp_path / "copy" / subset).mkdir(parents=True)
        records = [{"question": subset, "answer": "#### 1"}]
        datasets.Dataset.from_list(records).to_parquet(tmp_path / "copy" / subset / "train-00000-of-00001.parquet")
    rows, _ = load_rows(f"gsm8k@{tmp_path / 'copy'}")
    assert [row.problem for row in rows] == ["main"]


def test_folder_written_by_save_to_disk(tmp_path: Path) -> None:
    whole = datasets.DatasetDict(
        {split: datasets.Dataset.from_list([{"question": split, "answer": "#### 1"}]) for split in ("train", "test")}
    )
    whole.save_to_disk(tmp_path / "whole")
    assert load_rows(f"gsm8k@{tmp_path / 'whole'}", "eval")[0][0].problem == "test"
    datasets.Dataset.from_list(SHAPES["amc23"][0]).save_to_disk(tmp_path / "one")
    assert load_rows(f"amc23@{tmp_path / 'one'}")[0][0].answer == "27"


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(name: str, subset: str | None, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([OLYMPIAD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("olympiadbench")[0][0].id == "1606"
    assert asked == [("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train")]


def test_hub_that_cannot_be_reached() -> None:
    """The tests run offline, so this is the real failure of the real library."""
    with pytest.raises(ValueError, match=r"math-ai/amc23 could not be loaded .*give a copy: amc23@FOLDER"):
        load_rows("amc23")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("aime24", {"answer": "1000"}, "an AIME answer is an integer from 0 to 999"),
        ("aime25", {"answer": "\\frac12"}, "an AIME answer is an integer from 0 to 999"),
        ("gsm8k", {"answer": "18"}, "column answer has no ####"),
        ("olympiadbench", {"final_answer": []}, "column final_answer must be a list of text"),
        ("olympiadbench", {"final_answer": None}, "column final_answer must be a list of text"),
        ("math500", {"problem": None}, "no problem"),
        ("dapo-math-17k", {"reward_model": {}}, "no column reward_model.ground_truth, which BytedTsinghua-SIA/DAPO"),
    ],
)
def test_a_row_unlike_its_dataset_is_bad(name: str, change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        KNOWN[name].parse(SHAPES[name][0][0] | change, "source", 1)


def test_repeated_rows_are_counted_and_contradictions_are_bad(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = DAPO | {"reward_model": {"ground_truth": "35", "style": "rule"}}
    source = f"dapo-math-17k@{_clone(tmp_path / 'copy', 'dapo-math-17k', {'train': [DAPO] * 4 + [other]})}"
    rows, bad = load_rows(source)
    assert (len(rows), [row.line for row in bad]) == (1, [5])
    assert bad[0].reason.startswith("id '9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079' is taken by an earlier row")
    assert caplog.messages == [f"{source}: 3 rows repeat an earlier one and are left out"]


def test_dapo_without_its_wrapper_is_left_as_it_is() -> None:
    plain = DAPO | {"prompt": [{"role": "user", "content": "Remember Solve?"}]}
    assert KNOWN["dapo-math-17k"].parse(plain, "source", 1).problem == "Remember Solve?"


def test_names() -> None:
    assert known_source("org/gsm8k") is None and known_source("gsm8k.jsonl") is None
    assert known_source("folder/me@home.jsonl") is None
    for source, message in [
        ("gsm8@/copy", "'gsm8' is not one of aime24, .*; did you mean gsm8k?"),
        ("gsm8k@", "give the folder or file of the copy after the @"),
    ]:
        with pytest.raises(ValueError, match=message):
            known_source(source)


def test_a_copy_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder or file"):
        load_rows(f"gsm8k@{tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: cannot be read as a copy of openai/gsm8k"):
        load_rows(f"gsm8k@{tmp_path / 'empty'}")


def test_table_names_them_all() -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(known_table())
    assert all(each.name in capture.get() and each.repository in capture.get() for each in KNOWN.values())
