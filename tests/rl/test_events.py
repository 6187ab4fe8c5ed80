"""The events of a run: written as they happen, read back defensively, and no reason to stop."""

import logging
from pathlib import Path

import pytest

from rl.events import Event, EventLog, read_events


def test_events_are_read_back_in_order_with_their_step(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append("resume", "resumed after step 0")
    log.step = 7
    log.append("alarm", "mismatch/k3 is 0.1,\nabove 0.05 \u2028")
    assert read_events(tmp_path) == [
        Event(0, "resume", "resumed after step 0"),
        Event(7, "alarm", "mismatch/k3 is 0.1,\nabove 0.05 \u2028"),
    ]
    assert (tmp_path / "events.jsonl").read_text().startswith('{"step": 0, "kind": "resume", "text": "resumed')


def test_a_run_without_events_has_none(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []


def test_a_line_torn_by_a_crash_is_left_out(tmp_path: Path) -> None:
    EventLog(tmp_path).append("skip", "a")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"step": 1, "ki')
    assert [event.text for event in read_events(tmp_path)] == ["a"]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": true, "kind": "skip", "text": "a"}',
        '{"step": 1, "kind": "party", "text": "a"}',
        '{"step": 1, "kind": ["skip"], "text": "a"}',
        '{"step": 1, "kind": "skip"}',
    ],
)
def test_a_line_that_is_no_event_is_refused_by_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "events.jsonl").write_text(f'{{"step": 1, "kind": "skip", "text": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"events\.jsonl: line 2 is no event"):
        read_events(tmp_path)


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "events.jsonl").mkdir()
    EventLog(tmp_path).append("alarm", "reward/mean fell")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "goes on without this event" in caplog.text and "reward/mean fell" in caplog.text
