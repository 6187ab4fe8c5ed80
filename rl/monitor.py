"""Where the metrics of a run go: `metrics.jsonl` (the record), trackers and one line a step on the console.

`metrics.jsonl` is what resume and the report read: steps that it cannot take wait in memory and in the checkpoints,
until it can. Trackers and the console are views of it, and a failing view is said once and left out.
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rl.eval_scores import AVERAGE
from rl.trackers import Guarded, TensorBoard, Tracker

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

Record = dict[str, float | None]
"""One step of `metrics.jsonl`: "step" and the metrics by name; None where the value was NaN or infinite."""


class LineFile:
    """A file of lines on a disk that may refuse them for a while: none is lost, doubled or torn."""

    def __init__(self, path: Path) -> None:
        self.waiting: list[str] = []
        self._path = path
        self._whole: int | None = None  # bytes of the file that are whole lines, where a write has failed
        self._failing = False

    def append(self, *lines: str) -> None:
        """Writes what waits and these; what the disk refuses waits, and that is said when it begins and ends."""
        self.waiting += lines
        if not self.waiting:
            return
        try:
            self._write("".join(line + "\n" for line in self.waiting).encode())
        except OSError as error:
            if not self._failing:
                logger.warning("%s cannot be written (%s); the run goes on and tries again", self._path, error)
            self._failing = True
            return
        if self._failing:
            logger.warning("%s is written again, and holds all %d lines that waited", self._path, len(self.waiting))
        self._failing = False
        self.waiting.clear()

    def _write(self, text: bytes) -> None:
        with self._path.open("ab") as file:
            if self._whole is None:
                self._whole = file.tell()
            else:
                file.truncate(self._whole)
            file.write(text)
        self._whole = None


class Monitor:
    """Writes one dict of metrics a step to every sink.

    Args:
        run_dir: the run folder; it must exist.
        console: where the line of a step is printed; None prints nothing.
        steps: the number of steps of the whole run, shown as `step 12/40`.
        trackers: by default TensorBoard alone.
    """

    def __init__(
        self,
        run_dir: Path,
        console: Console | None = None,
        steps: int | None = None,
        trackers: Sequence[Tracker] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._console = console
        self._steps = steps
        self._file = LineFile(run_dir / METRICS_FILE)
        self._trackers = [Guarded(each) for each in trackers or [TensorBoard(run_dir / "tensorboard")]]
        self._first_step: int | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of one step. No sink that fails stops the run."""
        assert "step" not in metrics, "the step is an argument, not a metric"
        record = _finite_record(step, metrics)
        self._file.append(json.dumps(record, allow_nan=False))
        values = {name: value for name, value in record.items() if name != "step" and value is not None}
        for tracker in self._trackers:
            tracker.write(step, values, self._first_step)
        if self._console is not None:
            self._console.print(step_line(record, self._steps), soft_wrap=True)

    def unwritten(self) -> list[Record]:
        """Steps that `metrics.jsonl` still lacks; a checkpoint keeps them for `truncate`."""
        return [json.loads(line) for line in self._file.waiting]

    def truncate(self, step: int, unwritten: Sequence[Record] = ()) -> None:
        """Forgets every step after `step`, and a last line torn by a crash; called on resume, before the first `log`.

        unwritten: what `unwritten` gave when the checkpoint of `step` was made. Raises `ValueError` as `read_metrics`
        does, `OSError` when the file cannot be rewritten.
        """
        assert self._first_step is None, "truncate comes once, before the first log"
        self._first_step = step + 1
        path = self._run_dir / METRICS_FILE
        if not path.exists() and not unwritten:
            return
        kept = {record["step"]: record for record in [*read_metrics(self._run_dir), *unwritten]}
        lines = [json.dumps(record) + "\n" for at, record in kept.items() if (at or 0) <= step]
        replace_text(path, "".join(lines))

    def close(self) -> None:
        """Tries once more to write what waits, and closes the trackers."""
        self._file.append()
        if self._file.waiting:
            logger.warning(
                "%s lacks %d steps; the last checkpoint holds them, and --resume writes them once the disk takes them",
                self._run_dir / METRICS_FILE,
                len(self._file.waiting),
            )
        for tracker in self._trackers:
            tracker.close()


def read_metrics(run_dir: Path) -> list[Record]:
    """The records of `metrics.jsonl`, in the order written; none when there is no such file yet.

    Torn and bad lines are treated as `read_json_lines` does; a line without a step raises `ValueError` too.
    """
    path = run_dir / METRICS_FILE
    records: list[Record] = read_json_lines(path) if path.exists() else []
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("step"), int):
            raise ValueError(f'{path}: line {number} has no whole number under "step"; remove the line')
    return records


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one JSON object a line.

    A last line that is not whole (a crash, or a run writing at this moment) is left out with a warning; any other
    line that is not a JSON object raises `ValueError`.
    """
    # As bytes: str.splitlines also splits at characters that JSON allows within a string.
    lines = path.read_bytes().splitlines()
    parsed = [_parse_object(line) for line in lines]
    if parsed and parsed[-1] is None:
        parsed.pop()
        logger.warning("%s: line %d, the last, is torn and was left out", path, len(lines))
    for number, line in enumerate(parsed, start=1):
        if line is None:
            start = lines[number - 1][:60]
            raise ValueError(f"{path}: line {number} starts {start!r}, but must be a JSON object; remove the line")
    return [line for line in parsed if line is not None]


def replace_text(path: Path, text: str) -> None:
    """Writes the file so that a reader, or a crash, finds the old text or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def evaluation_metric(record: Record) -> str | None:
    """The name of the record's evaluation score (`eval/avg@8` for 8 samples a problem), None where it has none."""
    return next((name for name in record if name.startswith(f"eval/{AVERAGE}")), None)


def step_line(record: Record, steps: int | None = None) -> Text:
    """The console's line: `step 12/40  reward 0.612  eval -  tokens/s 21,300  mismatch 0/23,511  2.9 s`.

    Where log-probs differ, `mismatch 3/23,511 k3 1.2e-04 max 0.031` says by how much; red while an alarm sounds.
    """
    step = f"{record['step']:.0f}" + (f"/{steps}" if steps is not None else "")
    evaluation = evaluation_metric(record)
    line = Text(f"step {step}")
    line.append(f"  reward {_shown(record.get('reward/mean'), '.3f')}", style="bold")
    line.append(f"  eval {_shown(record.get(evaluation) if evaluation else None, '.3f')}")
    line.append(f"  tokens/s {_shown(record.get('rollout/tokens_per_second'), ',.0f')}")
    line.append(f"  mismatch {_mismatch(record)}", style="bold red" if record.get("monitor/alarms") else "")
    line.append(f"  {_shown(record.get('time/step'), '.1f')} s")
    return line


def _mismatch(record: Record) -> str:
    unequal, k3, largest = (record.get(f"mismatch/{name}") for name in ("tokens_unequal", "k3", "log_prob_diff_max"))
    counts = f"{_shown(unequal, ',.0f')}/{_shown(record.get('mismatch/tokens_compared'), ',.0f')}"
    return f"{counts} k3 {_shown(k3, '.1e')} max {_shown(largest, '.2g')}" if largest else counts


def _shown(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _finite_record(step: int, metrics: dict[str, float]) -> Record:
    non_finite = [name for name, value in metrics.items() if not math.isfinite(value)]
    record: Record = {"step": step, **metrics, **dict.fromkeys(non_finite)}
    if non_finite:
        logger.warning("step %d: not finite: %s", step, ", ".join(f"{name}={metrics[name]}" for name in non_finite))
        record["monitor/non_finite"] = len(non_finite)
    return record


def _parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
