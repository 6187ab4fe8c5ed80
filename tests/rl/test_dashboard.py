"""`lockstep monitor`: what it shows of a run folder, at any moment of the run's life."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from rl.dashboard import Snapshot, braille_curve, dashboard, follow_lines, newest_run, watch
from rl.events import EventLog
from rl.monitor import METRICS_FILE
from tests.rl.command import lockstep, refusal


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def shown(path: Path, width: int = 120) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(dashboard(Snapshot.read(path), width))
        return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_finished_run_fits_any_terminal(run: Path, width: int) -> None:
    text = shown(run, width)
    assert max(map(len, text.splitlines())) <= width
    for word in ("tiny", "completed", "4/4", "aligned", "0 of ", "reward", "k3", "rollout", "train", "memory"):
        assert word in text, word


def test_a_run_that_has_only_begun(run: Path) -> None:
    for name in (METRICS_FILE, "summary.json"):
        (run / name).unlink()
    text = shown(run)
    assert "starting" in text and "0/4" in text and "reward" not in text


def test_a_torn_last_line_is_left_for_later(run: Path) -> None:
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "rew')
    assert Snapshot.read(run).step == 4


def test_unequal_tokens_and_events_are_seen(run: Path) -> None:
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    lines[-1]["mismatch/tokens_unequal"] = 17
    (run / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = EventLog(run)
    log.step = 3
    log.append("alarm", "mismatch/k3 is 0.2, above 0.05\x1b[2J")
    text = shown(run)
    assert "17 of " in text and "step 3 alarm mismatch/k3 is 0.2, above 0.05 [2J" in text
    assert "\x1b" not in text


def test_a_running_run_says_how_long_it_will_take(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"status": "running"}))
    lines = (run / METRICS_FILE).read_text().splitlines()[:2]
    (run / METRICS_FILE).write_text("\n".join(lines) + "\n")
    text = shown(run)
    assert "running" in text and "2/4, " in text and " left" in text and "q leaves" in text


def test_without_a_terminal_it_prints_lines(run: Path) -> None:
    EventLog(run).append("resume", "after step 2")
    result = lockstep("monitor", run)
    lines = result.output.splitlines()
    assert result.exit_code == 0
    assert lines[0] == "step 0 resume after step 2" and lines[-1].endswith("completed")
    assert [line.split()[1] for line in lines[1:-1]] == ["1/4", "2/4", "3/4", "4/4"]


def test_it_follows_a_run_that_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (run / METRICS_FILE).read_text().splitlines()
    (run / METRICS_FILE).write_text(whole[0] + "\n")
    (run / "summary.json").write_text(json.dumps({"status": "running"}))
    states = iter([whole[:2], whole[:3]])

    def later(seconds: float) -> None:
        lines = next(states, None)
        if lines is None:
            (run / "summary.json").write_text(json.dumps({"status": "failed"}))
        else:
            (run / METRICS_FILE).write_text("\n".join(lines) + "\n")

    monkeypatch.setattr("rl.dashboard.time", SimpleNamespace(sleep=later))  # not every thread's
    lines = [line.plain for line in follow_lines(run)]
    assert [line.split()[1] for line in lines[:-1]] == ["1/4", "2/4", "3/4"] and lines[-1].endswith("failed")


def test_a_terminal_gets_the_screen(run: Path) -> None:
    console = Console(width=100, record=True, force_terminal=True, file=(run / "screen").open("w"))
    with console.file:
        watch(run, console)
    assert "completed" in (run / "screen").read_text()


def test_the_newest_run_is_found(run: Path, tmp_path: Path) -> None:
    assert newest_run(tmp_path) == run
    with pytest.raises(ValueError, match="no run under"):
        newest_run(tmp_path / "nowhere")
    assert "holds no run" in refusal("monitor", tmp_path)


def test_a_curve_rises_from_the_lower_left_to_the_upper_right() -> None:
    lines = braille_curve([(0, 0.0), (10, 1.0)], 10, 4, 2)
    assert lines == ["⠀⠀⡠⠊", "⡠⠊⠀⠀"]


def test_a_curve_ends_where_the_run_is() -> None:
    (line,) = braille_curve([(0, 1.0), (5, 1.0)], 10, 10, 1)
    assert line == "⣀⣀⣀⣀⣀⡀⠀⠀⠀⠀"
