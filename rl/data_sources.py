"""Reads a source of problems: a .jsonl, .json or .parquet file, a known dataset or a copy of it, a dataset on the hub.

A row that cannot be used is reported with its place and reason, and costs no other row.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.data_columns import Row, parse_json, parse_record
from rl.data_config import SYNTHETIC
from rl.data_files import FILE_SUFFIXES, file_items, wrong_suffix
from rl.known_datasets import KnownSource, known_source
from rl.problems import Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadRow:
    """A record that cannot be used. `line` counts from 1: lines of a .jsonl, records of anything else."""

    source: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


def load_rows(source: str, use: Split = "train") -> tuple[list[Row], list[BadRow]]:
    """Good and bad rows of a source, each in its order. `use` picks the split of a known dataset that names none.

    Raises ValueError where the source as a whole cannot be read: no such file, not Parquet, no such dataset, offline.
    """
    known = known_source(source)
    parse: Callable[[object, str, int], Row] = known.dataset.parse if known else parse_record
    rows: dict[str, Row] = {}
    bad: list[BadRow] = []
    repeated = 0
    for line, item in _known_items(known, use) if known else _items(source):
        try:
            row = parse(parse_json(item) if isinstance(item, bytes) else item, source, line)
            if known and known.dataset.repeats and row == rows.get(row.id):
                repeated += 1
                continue
            if row.id in rows:
                raise ValueError(f"id {row.id!r} is taken by an earlier row: give every row its own, or none")
            rows[row.id] = row
        except ValueError as error:
            bad.append(BadRow(source, line, str(error)))
    if repeated:
        logger.warning("%s: %d rows repeat an earlier one and are left out", source, repeated)
    return list(rows.values()), bad


def _items(source: str) -> Iterable[tuple[int, object]]:
    """Numbered records of a file, or of a dataset on the hub."""
    path = Path(source)
    if path.suffix in FILE_SUFFIXES:
        return file_items(path)
    if path.is_file():
        raise ValueError(wrong_suffix(path))
    return enumerate(_hugging_face(source), start=1)


def _hugging_face(source: str) -> Iterable[object]:
    name, _, split = source.partition(":")
    try:
        with _datasets() as datasets:
            records: Iterable[object] = datasets.load_dataset(name, split=split or "train")
            return records
    except ValueError as error:
        raise ValueError(
            f"{source!r} is neither {SYNTHETIC!r}, nor a file ({', '.join(FILE_SUFFIXES)}), nor a known dataset "
            f"(`lockstep data list`), nor a Hugging Face dataset that could be loaded from here: {error}. Without a "
            "network, download it first and give the file"
        ) from error


def _known_items(source: KnownSource, use: Split) -> Iterable[tuple[int, object]]:
    copy = source.copy
    if copy is None:
        return enumerate(_from_hub(source, source.split_for(use)), start=1)
    if copy.is_dir():
        return enumerate(_from_folder(source, source.split_for(use), copy), start=1)
    if copy.suffix not in FILE_SUFFIXES:
        raise ValueError(wrong_suffix(copy) if copy.is_file() else f"{copy}: no such folder or file")
    return file_items(copy)


def _from_hub(source: KnownSource, split: str) -> Iterable[object]:
    dataset = source.dataset
    try:
        with _datasets() as datasets:
            return _used_columns(source, datasets.load_dataset(dataset.repository, dataset.subset, split=split))
    except ValueError as error:
        raise ValueError(
            f"{dataset.name}: {dataset.repository} could not be loaded from the Hugging Face hub: {error}. Without a "
            f"network, give a copy: {dataset.name}@FOLDER"
        ) from error


def _from_folder(source: KnownSource, split: str, folder: Path) -> Iterable[object]:
    """A dataset with one split on the hub may have it under any name here: a plain folder calls it train."""
    dataset = source.dataset
    try:
        splits = _splits(folder, dataset.subset)
    except ValueError as error:
        raise ValueError(f"{folder}: cannot be read as a copy of {dataset.repository}: {error}") from error
    if split not in splits and len(splits) == 1 and not source.split and len(dataset.splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise ValueError(f"{folder}: no split {split!r} of {dataset.name}; found {', '.join(splits)}")
    return _used_columns(source, splits[split])


def _splits(folder: Path, subset: str | None) -> dict[str, Any]:
    """Splits by name of a folder as `save_to_disk` wrote it, a clone of a repository, or a plain one of data files."""
    with _datasets() as datasets:
        if (folder / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(folder)))
        if (folder / "state.json").is_file():
            records = datasets.load_from_disk(str(folder))
            return {str(records.split or "train"): records}
        if subset and subset not in datasets.get_dataset_config_names(str(folder)):
            folder, subset = (folder / subset if (folder / subset).is_dir() else folder), None
        return dict(datasets.load_dataset(str(folder), subset))


def _used_columns(source: KnownSource, records: Any) -> Any:
    """Without the columns that are not read: OlympiadBench has pictures, which would be decoded."""
    used = {name.partition(".")[0] for name in source.dataset.columns}
    return records.select_columns([name for name in records.column_names if name in used])


@contextmanager
def _datasets() -> Iterator[Any]:
    """The `datasets` library; whatever it cannot find or read is a ValueError."""
    import datasets  # here, because it takes seconds to import and most runs read no dataset by name

    try:
        yield datasets
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(str(error)) from error
