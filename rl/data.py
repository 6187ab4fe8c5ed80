"""Problems in, prompts in order: data sets from files, Hugging Face or the generator, and who is asked at which step.

A data set with a single bad row is refused before a run starts; `check_report` lists every bad row.
"""

import difflib
import json
import logging
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from rl.data_columns import Row, is_whole_number, parse_json, parse_record
from rl.data_config import SYNTHETIC, DataConfig
from rl.problems import Problem, Split, generate

logger = logging.getLogger(__name__)

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
BAD_ROWS_SHOWN = 3


@dataclass(frozen=True)
class BadRow:
    """A record that cannot be used. `line` counts from 1: lines of a .jsonl, records of anything else."""

    source: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


def load_rows(source: str) -> tuple[list[Row], list[BadRow]]:
    """Good and bad rows of a file or Hugging Face dataset, each in the order of the source.

    Raises ValueError where the source as a whole cannot be read: no such file, not Parquet, no such dataset, offline.
    """
    rows: dict[str, Row] = {}
    bad: list[BadRow] = []
    for line, item in _items(source):
        try:
            row = parse_record(parse_json(item) if isinstance(item, bytes) else item, source, line)
            if row.id in rows:
                raise ValueError(f"id {row.id!r} is taken by an earlier row: give every row its own, or none")
            rows[row.id] = row
        except ValueError as error:
            bad.append(BadRow(source, line, str(error)))
    return list(rows.values()), bad


def _items(source: str) -> Iterable[tuple[int, object]]:
    """Numbered records; a line of a .jsonl comes as bytes, to be parsed where a failure costs one row only."""
    path = Path(source)
    if path.suffix not in FILE_SUFFIXES:
        if path.is_file():
            raise ValueError(f"{source}: suffix {path.suffix!r} is not one of {', '.join(FILE_SUFFIXES)}")
        return enumerate(_hugging_face(source), start=1)
    if not path.is_file():
        raise ValueError(_missing(path))
    if path.suffix == ".jsonl":
        lines = enumerate(_read(path).split(b"\n"), start=1)
        return [(number, line) for number, line in lines if line.strip()]
    return enumerate(_json_list(path) if path.suffix == ".json" else _parquet(path), start=1)


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: there is no folder {path.parent}"
    names = [other.name for other in path.parent.iterdir() if other.suffix in FILE_SUFFIXES]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"{path}: no such file" + (f"; did you mean {path.with_name(close[0])}?" if close else "")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def _json_list(path: Path) -> list[object]:
    try:
        records = parse_json(_read(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error} (one object per line? then name it .jsonl)") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: a .json data set must be a list of objects; one object per line is .jsonl")
    return records


def _parquet(path: Path) -> list[dict[str, object]]:
    try:
        records: list[dict[str, object]] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from error
    return records


def _hugging_face(source: str) -> Iterable[object]:
    import datasets  # here, because it takes seconds to import and most runs read no dataset by name

    name, _, split = source.partition(":")
    try:
        records: Iterable[object] = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source!r} is neither {SYNTHETIC!r}, nor a file ({', '.join(FILE_SUFFIXES)}), nor a Hugging Face dataset "
            f"that could be loaded from here: {error}. Without a network, download it first and give the file"
        ) from error
    return records


def load_problems(config: DataConfig, split: Split, seed: int) -> list[Row]:
    """The rows to train or evaluate on. `seed` picks the synthetic problems; other sources keep their order.

    Raises ValueError on a source that cannot be read, is empty, or has any bad row.
    """
    source = config.train if split == "train" else config.eval
    if source == SYNTHETIC:
        size = config.train_size if split == "train" else config.eval_size
        problems = generate(split, size, seed, config.difficulty, config.families)
        return [Row(each.id, each.problem, each.answer, f"{SYNTHETIC}/{each.family}") for each in problems]
    rows, bad = load_rows(source)
    if bad:
        raise ValueError(_refusal(source, bad, len(rows) + len(bad)))
    if not rows:
        raise ValueError(f"{source}: no rows; a data set needs at least one")
    if split == "eval" and len(rows) > config.eval_size:
        logger.warning("evaluating on the first %d of %d rows of %s", config.eval_size, len(rows), source)
        rows = rows[: config.eval_size]
    return rows


def _refusal(source: str, bad: Sequence[BadRow], total: int) -> str:
    shown = "\n".join(f"  {row}" for row in bad[:BAD_ROWS_SHOWN])
    return f"{len(bad)} of {total} rows cannot be used (run `lockstep data check {source}` for all):\n{shown}"


def check_report(source: str, rows: Sequence[Row], bad: Sequence[BadRow]) -> str:
    """What a run would make of the rows that `load_rows` found: counts, the first row, and every bad row."""
    lines = [f"{source}: {len(rows)} good rows, {len(bad)} bad"]
    if rows:
        longest = max(len(row.problem) for row in rows)
        whole = sum(is_whole_number(row.answer) for row in rows)
        distinct = len({row.problem for row in rows})
        lines += [
            f"problems: {distinct} distinct, longest {longest} characters",
            f"answers: {whole} whole numbers, {len(rows) - whole} others",
            f"first row: id {rows[0].id}, answer {rows[0].answer!r}, problem {rows[0].problem!r}",
        ]
    return "\n".join(lines + [str(row) for row in bad])


def write_jsonl(problems: Iterable[Problem], path: Path) -> None:
    """Write problems as JSON lines that `load_rows` reads back. Raises ValueError where `path` cannot be written."""
    records = [
        {"id": each.id, "problem": each.problem, "answer": each.answer, "solution": each.solution} for each in problems
    ]
    try:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class PromptOrder:
    """Which rows are asked at which step: a function of the seed and the step, so that a resumed run needs no state.

    Every epoch is a permutation of the rows; a step takes the next rows, across the end of an epoch where need be.
    """

    num_rows: int
    seed: int

    def batch(self, step: int, prompts_per_step: int) -> list[int]:
        """Row numbers of a step, [prompts_per_step]. None occurs twice unless `prompts_per_step > num_rows`."""
        assert self.num_rows > 0 and step >= 0 and prompts_per_step > 0
        batch: list[int] = []
        while len(batch) < prompts_per_step:
            epoch, start = divmod(step * prompts_per_step + len(batch), self.num_rows)
            wanted = prompts_per_step - len(batch)
            batch += self._epoch(epoch, prompts_per_step)[start : start + wanted]
        return batch

    def _epoch(self, epoch: int, prompts_per_step: int) -> list[int]:
        """The permutation of an epoch, in which rows already asked in the step that opens it wait for a later step.

        To know those rows takes the order of the epoch before, so the walk starts at an epoch that opens a step. The
        repair moves only the first `prompts_per_step` rows: where the last rows are out of reach, one epoch will do.
        """
        if prompts_per_step > self.num_rows:
            return self._shuffled(epoch)
        first = epoch - epoch % (prompts_per_step // math.gcd(prompts_per_step, self.num_rows))
        if self.num_rows >= 2 * prompts_per_step:
            first = max(first, epoch - 1)
        order = self._shuffled(first)
        for later in range(first + 1, epoch + 1):
            asked = set(order[-(later * self.num_rows % prompts_per_step) :])
            order = self._shuffled(later)
            order[:prompts_per_step] = sorted(order[:prompts_per_step], key=asked.__contains__)
        return order

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(self.num_rows))
        random.Random(f"lockstep prompt order {self.seed} {epoch}").shuffle(order)
        return order
