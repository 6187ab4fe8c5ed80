"""The problems of a run, read from their sources, and what `lockstep data` says of them."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rl.data_columns import Row
from rl.data_config import SYNTHETIC, DataConfig
from rl.data_files import FILE_SUFFIXES
from rl.data_filters import answer_types
from rl.data_sources import BadRow, load_rows
from rl.duplicates import find_duplicates
from rl.problem_text import words
from rl.problems import Problem, Split, generate

logger = logging.getLogger(__name__)

BAD_ROWS_SHOWN = 3


def load_problems(config: DataConfig, split: Split, seed: int) -> list[Row]:
    """The rows of every source, one source after the other. `seed` picks the synthetic problems.

    Raises ValueError on a source that cannot be read, is empty, or has any bad row.
    """
    if split == "train":
        return [row for each in config.train for row in _load(each.source, config, split, seed)]
    rows = _load(config.eval, config, split, seed)
    if len(rows) > config.eval_size:
        logger.warning("evaluating on the first %d of %d rows of %s", config.eval_size, len(rows), config.eval)
    return rows[: config.eval_size]


def _load(source: str, config: DataConfig, split: Split, seed: int) -> list[Row]:
    if source == SYNTHETIC:
        size = config.train_size if split == "train" else config.eval_size
        problems = generate(split, size, seed, config.difficulty, config.families)
        return [Row(each.id, each.problem, each.answer, f"{SYNTHETIC}/{each.family}") for each in problems]
    rows, bad = load_rows(source, split)
    if bad:
        raise ValueError(_refusal(source, bad, len(rows) + len(bad)))
    if not rows:
        raise ValueError(f"{source}: no rows; a data set needs at least one")
    return rows


def _refusal(source: str, bad: Sequence[BadRow], total: int) -> str:
    shown = "\n".join(f"  {row}" for row in bad[:BAD_ROWS_SHOWN])
    return f"{len(bad)} of {total} rows cannot be used (run `lockstep data check {source}` for all):\n{shown}"


def source_of(row: Row) -> str:
    """The name under which a recipe lists the source of a row."""
    return SYNTHETIC if row.source.startswith(f"{SYNTHETIC}/") else row.source


def source_labels(sources: Sequence[str]) -> list[str]:
    """Short names of sources for metrics: without folder, suffix and copy, unless two were the same then."""
    short = [Path(source.partition("@")[0]).name for source in sources]
    short = [name.removesuffix(Path(name).suffix) if name.endswith(FILE_SUFFIXES) else name for name in short]
    return short if len(set(short)) == len(short) else list(sources)


def check_report(source: str, rows: Sequence[Row], bad: Sequence[BadRow]) -> str:
    """What a run would make of the rows that `load_rows` found: counts, the first row, and every bad row."""
    lines = [f"{source}: {len(rows)} good rows, {len(bad)} bad"]
    if rows:
        longest = max(len(row.problem) for row in rows)
        kinds = Counter(kind for row in rows for kind in sorted(answer_types(row.answer)))
        distinct = len({words(row.problem) for row in rows})
        near = len(find_duplicates(rows, near=True)) - (len(rows) - distinct)
        lines += [
            f"problems: {distinct} distinct, {near} of them nearly the same as another; longest {longest} characters",
            f"answers: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}",
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
