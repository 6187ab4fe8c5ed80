"""The sinks of a run's metrics: the record survives crashes, a failing TensorBoard does not stop the run."""

import errno
import io
import json
import logging
import math
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from rl.monitor import LineFile, Monitor, read_json_lines, read_metrics, replace_text, step_line


class Silent:
    """A tracker that shows nothing."""

    label = "nothing"
    failures: tuple[type[Exception], ...] = ()

    def open(self, first_step: int | None) -> None: ...

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def test_a_step_is_one_line_of_json(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    monitor.log(1, {"reward/mean": 0.25, "time/step": 2.5})
    monitor.log(2, {"reward/mean": 0.5})
    # Readable before close: what is logged is on disk.
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "reward/mean": 0.25, "time/step": 2.5}\n{"step": 2, "reward/mean": 0.5}\n'
    )
    monitor.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "reward/mean": 0.25, "time/step": 2.5},
        {"step": 2, "reward/mean": 0.5},
    ]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4), st.data())
def test_a_record_torn_anywhere_keeps_every_whole_step(
    tmp_path_factory: pytest.TempPathFactory, rewards: list[float], data: st.DataObject
) -> None:
    records = [{"step": step, "reward/mean": reward} for step, reward in enumerate(rewards)]
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    size = data.draw(st.integers(0, len(b"".join(lines))))
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "metrics.jsonl").write_bytes(b"".join(lines)[:size])
    Monitor(run_dir).truncate(len(lines))
    # A line is whole without its line feed, which the rewritten file has again.
    whole = sum(len(b"".join(lines[: count + 1])) - 1 <= size for count in range(len(lines)))
    assert read_metrics(run_dir) == records[:whole]
    assert (run_dir / "metrics.jsonl").read_bytes() == b"".join(lines[:whole])


def test_values_that_are_not_finite_become_null_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = Monitor(tmp_path)
    monitor.log(3, {"policy/loss": math.nan, "policy/grad_norm": math.inf, "reward/mean": 1.0})
    monitor.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 3, "policy/loss": null, "policy/grad_norm": null, "reward/mean": 1.0, "monitor/non_finite": 2}\n'
    )
    assert "policy/loss=nan, policy/grad_norm=inf" in caplog.text


def test_tensorboard_shows_the_steps_that_count_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run is another process. In one process and second, TensorBoard orders files by a counter, as text."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    crashed = Monitor(tmp_path)
    for step, reward in ((1, 0.125), (2, 0.25), (3, 0.75)):
        crashed.log(step, {"reward/mean": reward})
    crashed.close()
    resumed = Monitor(tmp_path)
    resumed.truncate(2)
    resumed.log(3, {"reward/mean": 0.5})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/mean")
    assert [(event.step, event.value) for event in events] == [(1, 0.125), (2, 0.25), (3, 0.5)]


def test_a_full_disk_under_tensorboard_is_said_once_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    monitor = Monitor(tmp_path)
    monitor.log(1, {"reward/mean": 0.5})
    monitor.log(2, {"reward/mean": 0.5})
    monitor.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "TensorBoard cannot be written" in caplog.text


def test_tensorboard_failing_in_the_middle_of_a_run_does_not_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full_disk(writer: SummaryWriter) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monitor = Monitor(tmp_path)
    monitor.log(1, {"reward/mean": 0.5})
    monkeypatch.setattr(SummaryWriter, "flush", full_disk)
    monitor.log(2, {"reward/mean": 0.5})
    monitor.log(3, {"reward/mean": 0.5})
    monitor.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert caplog.text.count("No space left on device") == 1


def test_steps_that_the_disk_refuses_are_written_when_it_takes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "metrics.jsonl"
    in_the_way.mkdir()
    monitor = Monitor(tmp_path, trackers=[Silent()])
    monitor.log(1, {"reward/mean": 0.5})
    monitor.log(2, {"reward/mean": 0.25})
    assert monitor.unwritten() == [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": 0.25}]
    in_the_way.rmdir()
    monitor.log(3, {"reward/mean": 1.0})
    assert [record["reward/mean"] for record in read_metrics(tmp_path)] == [0.5, 0.25, 1.0]
    assert monitor.unwritten() == []
    refused, back = (record.getMessage() for record in caplog.records)
    assert "cannot be written" in refused and "holds all 3 lines that waited" in back


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system writes files up to so many bytes and refuses the rest, as a disk does that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 20, 21, 22, 30, 42])
def test_a_disk_that_fills_up_within_a_line_tears_and_doubles_nothing(tmp_path: Path, room: int) -> None:
    path = tmp_path / "lines.jsonl"
    file, lines = LineFile(path), [json.dumps({"step": step, "value": 0.5}) for step in range(4)]
    file.append(lines[0])
    with largest_file(path.stat().st_size + room):
        file.append(lines[1])
        file.append(lines[2])
    assert file.waiting
    assert path.stat().st_size <= len(lines[0]) + 1 + room
    file.append(lines[3])
    assert path.read_text().splitlines() == lines


def test_steps_that_were_never_written_come_back_from_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a/b": 1.5}\n{"step": 2, "a/b": 2.5}\n{"step": 3, "a')
    Monitor(tmp_path).truncate(4, [{"step": step, "a/b": step + 0.5} for step in (2, 3, 4)])
    assert read_metrics(tmp_path) == [{"step": step, "a/b": step + 0.5} for step in (1, 2, 3, 4)]


def test_what_still_waits_at_the_end_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    monitor = Monitor(tmp_path, trackers=[Silent()])
    monitor.log(1, {"reward/mean": 0.5})
    monitor.close()
    assert "metrics.jsonl lacks 1 steps; the last checkpoint holds them" in caplog.messages[-1]


def test_truncate_drops_later_steps_and_a_torn_last_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a/b": 1.5}\n{"step": 2, "a/b": null}\n{"step": 3}\n{"step": 4, "a/')
    Monitor(tmp_path).truncate(2)
    assert path.read_text() == '{"step": 1, "a/b": 1.5}\n{"step": 2, "a/b": null}\n'
    assert "line 4, the last, is torn" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_before_the_first_step_has_nothing_to_do(tmp_path: Path) -> None:
    Monitor(tmp_path).truncate(0)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("damaged", ["not json", "[1]", '{"a/b": 1.0}', '{"step": "1"}', ""])
def test_a_damaged_line_in_the_middle_is_refused_by_number(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 .*remove the line"):
        read_metrics(tmp_path)


def test_json_lines_are_split_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028two\u0085three"}\n', encoding="utf-8")
    assert read_json_lines(path) == [{"text": "one\u2028two\u0085three"}]


def test_replace_text_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "new")
    assert path.read_text() == "old"


def test_the_console_gets_one_plain_line_a_step(tmp_path: Path) -> None:
    log = io.StringIO()
    monitor = Monitor(tmp_path, Console(file=log, width=20), steps=40)
    metrics = {
        "reward/mean": 0.6123,
        "eval/avg@8": 0.5,
        "rollout/tokens_per_second": 21300.4,
        "mismatch/tokens_unequal": 0,
        "mismatch/tokens_compared": 23511,
        "time/step": 2.94,
    }
    monitor.log(12, metrics)
    monitor.close()
    line = "step 12/40  reward 0.612  eval 0.500  tokens/s 21,300  mismatch 0/23,511  2.9 s\n"
    assert log.getvalue() == line


def test_metrics_that_are_missing_show_as_a_dash() -> None:
    assert step_line({"step": 7, "reward/mean": None}).plain == (
        "step 7  reward -  eval -  tokens/s -  mismatch -/-  - s"
    )


def test_where_log_probs_differ_the_console_says_by_how_much() -> None:
    mismatch = {"mismatch/tokens_unequal": 3, "mismatch/k3": 1.234e-4, "mismatch/log_prob_diff_max": 0.03125}
    assert "  mismatch 3/- k3 1.2e-04 max 0.031  " in step_line({"step": 7, **mismatch}).plain


def test_a_mismatch_that_sounds_an_alarm_stands_out_on_the_console() -> None:
    def style(sounding: float) -> str:
        line = step_line({"step": 7, "mismatch/tokens_unequal": 2, "monitor/alarms": sounding})
        return next(str(span.style) for span in line.spans if "mismatch" in line.plain[span.start : span.end])

    assert style(2) == "bold red"
    with pytest.raises(StopIteration):
        style(0)
