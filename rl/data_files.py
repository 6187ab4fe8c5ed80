"""The records of a problem file: JSON lines, a JSON list, or Parquet."""

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from rl.data_columns import parse_json

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


def file_items(path: Path) -> Iterable[tuple[int, object]]:
    """A line of a .jsonl comes as bytes, to be parsed where a failure costs one row only."""
    if not path.is_file():
        raise ValueError(_missing(path))
    if path.suffix == ".jsonl":
        lines = enumerate(_read(path).split(b"\n"), start=1)
        return [(number, line) for number, line in lines if line.strip()]
    return enumerate(_json_list(path) if path.suffix == ".json" else _parquet(path), start=1)


def wrong_suffix(path: Path) -> str:
    return f"{path}: suffix {path.suffix!r} is not one of {', '.join(FILE_SUFFIXES)}"


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


def _parquet(path: Path) -> Iterator[dict[str, object]]:
    """A part at a time: a row as Python objects takes ten times its space on disk."""
    try:
        for part in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from part.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from error
