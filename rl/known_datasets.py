r"""Datasets that have a short name here: where each is on the Hugging Face hub, and which of its columns mean what.

`gsm8k` is the dataset on the hub, `gsm8k:test` a certain split, `gsm8k@FOLDER` or `gsm8k:test@FOLDER` a copy of it.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.table import Table

from rl.data_columns import Row, parse_record
from rl.problems import Split

_DEGREES = re.compile(r"\^\{?\\circ\}?")
# The words that DAPO puts around every problem; the prompt template of a recipe takes their place.
_DAPO_BEFORE = re.compile(r"Solve the following math problem step by step\.[^\n]*\n\s*")
_DAPO_AFTER = re.compile(r"\s*\nRemember to put your answer on its own line after \"Answer:\"[^\n]*\s*$")


@dataclass(frozen=True)
class KnownDataset:
    """One dataset. `columns` maps its column names (`a.b` for a field of a column) to ours, of `rl.data_columns`."""

    name: str
    repository: str
    splits: tuple[str, ...]  # the first for training, the last for evaluation
    problems: str
    answers: str
    columns: Mapping[str, str]
    subset: str | None = None
    repeats: bool = False  # rows are there many times
    read_answer: Callable[[object], object] = field(default=lambda value: value)
    read_problem: Callable[[str], str] = field(default=lambda text: text)

    def parse(self, record: object, source: str, number: int) -> Row:
        """The row of a record. Raises ValueError as `parse_record` does, and where a column is missing."""
        if not isinstance(record, Mapping):
            return parse_record(record, source, number)
        ours = {name: self._value(record, theirs, name) for theirs, name in self.columns.items()}
        row = parse_record(ours | {"answer": self.read_answer(ours["answer"])}, source, number)
        problem = self.read_problem(row.problem)
        return row if problem == row.problem else replace(row, problem=problem, messages=())

    def _value(self, record: Mapping[str, object], theirs: str, name: str) -> object:
        value: object = record
        for part in theirs.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif name == "id":
                return None
            else:
                raise ValueError(f"no column {theirs}, which {self.repository} has: is this another dataset?")
        return value


@dataclass(frozen=True)
class KnownSource:
    """What a short name in a recipe stands for. `split` is None where the name leaves it open."""

    dataset: KnownDataset
    split: str | None
    copy: Path | None

    def split_for(self, use: Split) -> str:
        return self.split or self.dataset.splits[0 if use == "train" else -1]


def known_source(source: str) -> KnownSource | None:
    """None if `source` is no short name. Raises ValueError for a copy of an unknown dataset, or in no place."""
    name_and_split, at, copy = source.partition("@")
    name, _, split = name_and_split.partition(":")
    dataset = KNOWN.get(name)
    if dataset is None:
        if at and re.fullmatch("[a-z0-9-]+", name):
            close = difflib.get_close_matches(name, KNOWN, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{source}: {name!r} is not one of {', '.join(KNOWN)}{hint}")
        return None
    if at and not copy:
        raise ValueError(f"{source}: give the folder or file of the copy after the @")
    return KnownSource(dataset, split or None, Path(copy) if copy else None)


def training_split(source: str) -> str:
    """The source with the split named that training would take of it, where that is left open."""
    known = known_source(source)
    if known is None or known.split:
        return source
    name, at, copy = source.partition("@")
    return f"{name}:{known.split_for('train')}{at}{copy}"


def _aime_answer(value: object) -> object:
    """An integer from 0 to 999; some copies print the degrees that a problem asks for."""
    text = _DEGREES.sub("", str(value)).strip().strip("$")
    if not re.fullmatch("[0-9]{1,3}", text):
        raise ValueError(f"answer {value!r}: an AIME answer is an integer from 0 to 999")
    return text


def _gsm8k_answer(value: object) -> object:
    if "####" not in str(value):
        raise ValueError("column answer has no ####, after which GSM8K gives the answer")
    return value


def _number(value: object) -> object:
    """Some copies keep integers as text of a float: 27.0."""
    return re.sub(r"^([0-9]+)\.0$", r"\1", value) if isinstance(value, str) else value


def _olympiad_answer(value: object) -> object:
    """A list of one answer, or of several that are all asked for, each between dollar signs."""
    if not isinstance(value, list) or not value or not all(isinstance(part, str) for part in value):
        raise ValueError(f"column final_answer must be a list of text, got {value!r}")
    return ", ".join(part.replace("$", "").strip() for part in value)


def _without_dapo_wrapper(problem: str) -> str:
    return _DAPO_AFTER.sub("", _DAPO_BEFORE.sub("", problem, count=1))


KNOWN = {
    each.name: each
    for each in (
        KnownDataset(
            "aime24",
            "HuggingFaceH4/aime_2024",
            splits=("train",),
            problems="30",
            answers="integers 0-999",
            columns={"id": "id", "problem": "problem", "answer": "answer"},
            read_answer=_aime_answer,
        ),
        KnownDataset(
            "aime25",
            "math-ai/aime25",
            splits=("test",),
            problems="30",
            answers="integers 0-999",
            columns={"id": "id", "problem": "problem", "answer": "answer"},
            read_answer=_aime_answer,
        ),
        KnownDataset(
            "math500",
            "HuggingFaceH4/MATH-500",
            splits=("test",),
            problems="500",
            answers="LaTeX",
            columns={"unique_id": "id", "problem": "problem", "answer": "answer"},
        ),
        KnownDataset(
            "gsm8k",
            "openai/gsm8k",
            subset="main",
            splits=("train", "test"),
            problems="7,473 and 1,319",
            answers="numbers, after ####",
            columns={"question": "problem", "answer": "answer"},
            read_answer=_gsm8k_answer,
        ),
        KnownDataset(
            "dapo-math-17k",
            "BytedTsinghua-SIA/DAPO-Math-17k",
            splits=("train",),
            problems="17,398, each about 100 times",
            answers="integers",
            columns={"extra_info.index": "id", "prompt": "prompt", "reward_model.ground_truth": "answer"},
            read_problem=_without_dapo_wrapper,
            repeats=True,
        ),
        KnownDataset(
            "olympiadbench",
            "Hothan/OlympiadBench",
            subset="OE_TO_maths_en_COMP",
            splits=("train",),
            problems="674",
            answers="LaTeX, sometimes several",
            columns={"id": "id", "question": "problem", "final_answer": "answer"},
            read_answer=_olympiad_answer,
        ),
        KnownDataset(
            "amc23",
            "math-ai/amc23",
            splits=("test",),
            problems="40",
            answers="numbers",
            columns={"id": "id", "question": "problem", "answer": "answer"},
            read_answer=_number,
        ),
    )
}


def known_table() -> Table:
    """What `lockstep data list` prints."""
    table = Table("name", "on the Hugging Face hub", "split", "problems", "answers")
    for each in KNOWN.values():
        place = f"{each.repository} ({each.subset})" if each.subset else each.repository
        table.add_row(each.name, place, " or ".join(each.splits), each.problems, each.answers)
    return table
