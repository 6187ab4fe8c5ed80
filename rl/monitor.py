"""Where the metrics of a run go: `metrics.jsonl` (the record), TensorBoard and one line a step on the console.

`metrics.jsonl` is what resume and the report read, so a failure to write it stops the run; TensorBoard and the
console are views of it, and a failing view is said once and left out.
"""

import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from rl.eval_scores import AVERAGE

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

Record = dict[str, float | None]
"""One step of `metrics.jsonl`: "step" and the metrics by name; None where the value was NaN or infinite."""


class Monitor:
    """Writes one dict of metrics a step to every sink.

    Args:
        run_dir: the run folder; it must exist.
        console: where the line of a step is printed; None prints nothing.
        steps: the number of steps of the whole run, shown as `step 12/40`.
    """

    def __init__(self, run_dir: Path, console: Console | None = None, steps: int | None = None) -> None:
        self._run_dir = run_dir
        self._console = console
        self._steps = steps
        self._tensorboard: SummaryWriter | None = None
        self._tensorboard_failed = False
        self._purge_step: int | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of one step; raises `OSError` when `metrics.jsonl` cannot be written."""
        assert "step" not in metrics, "the step is an argument, not a metric"
        record = _finite_record(step, metrics)
        line = json.dumps(record, allow_nan=False)
        with (self._run_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._write_tensorboard(step, record)
        if self._console is not None:
            self._console.print(step_line(record, self._steps), soft_wrap=True)

    def truncate(self, step: int) -> None:
        """Forgets every step after `step`, and a last line torn by a crash; called on resume, before the first `log`.

        Raises `ValueError` as `read_metrics` does.
        """
        assert self._tensorboard is None, "truncate comes before the first log"
        self._purge_step = step + 1
        path = self._run_dir / METRICS_FILE
        if not path.exists():
            return
        kept = [record for record in read_metrics(self._run_dir) if (record["step"] or 0) <= step]
        replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def close(self) -> None:
        """Flushes and closes TensorBoard; the record needs no closing."""
        if self._tensorboard is None:
            return
        try:
            self._tensorboard.close()
        except OSError as error:
            self._give_up_tensorboard(error)
        self._tensorboard = None

    def _write_tensorboard(self, step: int, record: Record) -> None:
        if self._tensorboard_failed:
            return
        try:
            if self._tensorboard is None:
                self._tensorboard = _open_tensorboard(self._run_dir / "tensorboard", self._purge_step)
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        except OSError as error:
            self._give_up_tensorboard(error)

    def _give_up_tensorboard(self, error: OSError) -> None:
        logger.warning("TensorBoard cannot be written (%s); the run goes on, with %s only", error, METRICS_FILE)
        self._tensorboard = None
        self._tensorboard_failed = True


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
    """The console's line: `step 12/40  reward 0.612  eval -  tokens/s 21,300  mismatch 0/23,511  2.9 s`."""
    step = f"{record['step']:.0f}" + (f"/{steps}" if steps is not None else "")
    unequal = record.get("mismatch/tokens_unequal")
    mismatch = f"{_shown(unequal, ',.0f')}/{_shown(record.get('mismatch/tokens_compared'), ',.0f')}"
    evaluation = evaluation_metric(record)
    line = Text(f"step {step}")
    line.append(f"  reward {_shown(record.get('reward/mean'), '.3f')}", style="bold")
    line.append(f"  eval {_shown(record.get(evaluation) if evaluation else None, '.3f')}")
    line.append(f"  tokens/s {_shown(record.get('rollout/tokens_per_second'), ',.0f')}")
    line.append(f"  mismatch {mismatch}", style="bold red" if unequal else "")
    line.append(f"  {_shown(record.get('time/step'), '.1f')} s")
    return line


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


def _open_tensorboard(log_dir: Path, purge_step: int | None) -> "SummaryWriter":
    # Imported here because it imports torch, which commands that only read a run folder should not wait for.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(log_dir), purge_step=purge_step)
