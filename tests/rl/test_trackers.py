"""TensorBoard, Weights & Biases and Prometheus: what they are given, and that none that fails stops a run."""

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from rl.events import EventLog
from rl.monitor import LineFile, Monitor, read_metrics
from rl.monitor_config import MonitorConfig, WandbConfig
from rl.trackers import Guarded, Prometheus, WeightsAndBiases, check_trackers, gauge_name, trackers
from rl.train import run_training
from tests.rl.tiny import STEPS, LocalSystem, tiny_recipe


class FakeRun:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.logged, self.axes, self.finished = settings, list[dict[str, float]](), list[Any](), False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


class FakeWandb:
    """What is used of the package; the server can be out of reach."""

    class Error(Exception): ...

    def __init__(self, reachable: bool = True) -> None:
        self.reachable, self.runs = reachable, list[FakeRun]()

    def Settings(self, **values: Any) -> dict[str, Any]:
        return values

    def init(self, **settings: Any) -> FakeRun:
        if not self.reachable:
            raise self.Error("no such host")
        self.runs.append(FakeRun(settings))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


CONFIG = WandbConfig(project="maths", entity="team")


def test_weights_and_biases_gets_recipe_and_steps(wandb: FakeWandb, tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, trackers=[WeightsAndBiases(CONFIG, tmp_path, {"seed": 3})])
    monitor.log(7, {"reward/mean": 0.5, "policy/kl": float("nan")})
    monitor.close()
    (run,) = wandb.runs
    asked = {name: run.settings[name] for name in ("project", "entity", "mode", "name", "resume", "config", "dir")}
    expected = {"project": "maths", "entity": "team", "mode": "online", "resume": "allow", "config": {"seed": 3}}
    assert asked == {**expected, "name": tmp_path.name, "dir": str(tmp_path)}
    assert run.logged == [{"step": 7, "reward/mean": 0.5, "monitor/non_finite": 1}]
    assert run.axes == [("*", "step")] and run.finished


def test_a_resumed_run_goes_on_in_the_same_run_of_weights_and_biases(wandb: FakeWandb, tmp_path: Path) -> None:
    for step in (1, 2):
        Monitor(tmp_path, trackers=[WeightsAndBiases(CONFIG, tmp_path, {})]).log(step, {"reward/mean": 0.5})
    first, second = (run.settings["id"] for run in wandb.runs)
    assert first == second and re.fullmatch("[0-9a-f]{16}", first)


def test_a_server_out_of_reach_is_said_once(wandb: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wandb.reachable = False
    monitor = Monitor(tmp_path, trackers=[WeightsAndBiases(CONFIG, tmp_path, {})])
    for step in (1, 2, 3):
        monitor.log(step, {"reward/mean": 0.5})
    monitor.close()
    assert caplog.messages == ["Weights & Biases cannot be written (no such host); the run goes on without it"]
    assert len(read_metrics(tmp_path)) == 3


def test_a_defect_of_ours_is_no_failing_tracker(wandb: FakeWandb, tmp_path: Path) -> None:
    class Wrong(WeightsAndBiases):
        def write(self, step: int, values: Mapping[str, float]) -> None:
            raise KeyError("ours")

    with pytest.raises(KeyError):
        Guarded(Wrong(CONFIG, tmp_path, {})).write(1, {}, None)


@pytest.mark.slow
def test_the_real_weights_and_biases_writes_offline(tmp_path: Path) -> None:
    config = WandbConfig(project="maths", mode="offline")
    for step in (1, 2):
        monitor = Monitor(tmp_path, trackers=[WeightsAndBiases(config, tmp_path, {"name": "tiny"})])
        monitor.log(step, {"reward/mean": 0.5})
        monitor.close()
    (identity,) = {path.stem.removeprefix("run-") for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert identity == (tmp_path / "wandb_id").read_text()


def test_prometheus_has_a_gauge_for_each_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[tuple[str, str, str], float] = {}

    class FakeGauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert tag_keys == ("run",)
            self.names = name, description

        def set_default_tags(self, tags: dict[str, str]) -> "FakeGauge":
            self.run = tags["run"]
            return self

        def set(self, value: float) -> None:
            shown[*self.names, self.run] = value

    monkeypatch.setattr("ray.util.metrics.Gauge", FakeGauge)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "MetricsExportPort": 8080}])
    tracker = Guarded(Prometheus("run-1"))
    for step, reward in ((1, 0.25), (2, 0.5)):
        tracker.write(step, {"reward/mean": reward, "eval/avg@8": 0.75}, None)
    assert shown == {
        ("lockstep_step", "step", "run-1"): 2.0,
        ("lockstep_reward_mean", "reward/mean", "run-1"): 0.5,
        ("lockstep_eval_avg_8", "eval/avg@8", "run-1"): 0.75,
    }


def test_a_cluster_that_exports_no_metrics_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "MetricsExportPort": -1}])
    tracker = Guarded(Prometheus("run-1"))
    tracker.write(1, {"reward/mean": 0.5}, None)
    tracker.close()
    (message,) = caplog.messages
    assert message.startswith("Prometheus cannot be written (no node of the Ray cluster exports metrics;")


@pytest.mark.parametrize("name", ["mismatch/position/1-31", "eval/pass@8", "data/prompts/org/set-main#1", "a/é"])
def test_names_are_those_that_prometheus_allows(name: str) -> None:
    assert re.fullmatch("lockstep_[a-zA-Z0-9_]*[a-zA-Z0-9]", gauge_name(name))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"wandb": {"project": "p"}}, "monitor.wandb needs the package wandb, which is not installed: pip install"),
        ({"prometheus": True}, "monitor.prometheus needs the package prometheus_client, .*set monitor.prometheus=fal"),
    ],
)
def test_a_tracker_that_is_not_installed_is_refused(
    asked: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=message):
        check_trackers(MonitorConfig.model_validate(asked))
    check_trackers(MonitorConfig())


def test_tensorboard_alone_is_shown_by_default(tmp_path: Path) -> None:
    assert [each.label for each in trackers(MonitorConfig(), tmp_path, {})] == ["TensorBoard"]


def full_disk_until(original: Callable[..., Any], done: Callable[..., bool]) -> Callable[..., Any]:
    """The function, for which the disk is full until `done` says otherwise of the arguments."""

    def write(*arguments: Any) -> Any:
        if not done(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    return write


def break_every_sink(monkeypatch: pytest.MonkeyPatch, run: Path, metrics_return_at: int) -> None:
    """TensorBoard, Weights & Biases, Prometheus, rollouts and events fail throughout, metrics before that step."""
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(reachable=False))
    monkeypatch.setattr("rl.train.check_trackers", lambda config: None)
    run.mkdir()
    for name in ("tensorboard", "rollouts"):
        (run / name).write_text("a file where the folder should be")
    (run / "events.jsonl").symlink_to("/dev/full")

    def back(file: LineFile, text: bytes) -> bool:
        return json.loads(text.splitlines()[-1])["step"] >= metrics_return_at

    monkeypatch.setattr(LineFile, "_write", full_disk_until(LineFile._write, back))


SINKS = ("monitor.wandb={project: p}", "monitor.prometheus=true")


def test_with_every_sink_failing_a_run_ends_in_the_same_bits_and_says_so(
    finished_run: Path,
    local: list[LocalSystem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    break_every_sink(monkeypatch, run, metrics_return_at=3)
    monkeypatch.setattr("rl.train.write_report", lambda folder: None)  # it reads the events, which have no end here
    summary = run_training(tiny_recipe(tmp_path, *SINKS), run, resume=False, console=Console(width=200))
    expected = json.loads((finished_run / "summary.json").read_text())
    assert summary["weights_digest"] == expected["weights_digest"] and summary["mismatch"] == expected["mismatch"]
    assert [record["step"] for record in read_metrics(run)] == list(range(1, STEPS + 1))
    said = [message.split(" (")[0] for message in caplog.messages if "cannot be written" in message]
    sinks = ["TensorBoard", "Weights & Biases", "Prometheus", str(run / "metrics.jsonl")]
    assert sorted(said) == sorted(f"{sink} cannot be written" for sink in sinks)
    assert any("metrics.jsonl is written again, and holds all 3 lines" in message for message in caplog.messages)
    output = capsys.readouterr().out
    assert output.count("the run goes on without the rollouts of such steps") == 1
    EventLog(run).append("skip", "a step")
    assert "events.jsonl cannot be written" in caplog.messages[-1]


def test_metrics_that_the_disk_refused_before_a_crash_are_there_after_resume(
    finished_run: Path, local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written before the run is interrupted at step 4; the checkpoint of step 3 holds three records."""

    def interrupted(run: Any, step: int, *rest: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt

    run, recipe, quiet = tmp_path / "run", tiny_recipe(tmp_path), Console(quiet=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LineFile, "_write", full_disk_until(LineFile._write, lambda *_: False))
        patch.setattr("rl.loop.save_rollouts", interrupted)
        run_training(recipe, run, resume=False, console=quiet)
    assert not (run / "metrics.jsonl").exists()
    summary = run_training(recipe, run, resume=True, console=quiet)
    assert [record["step"] for record in read_metrics(run)] == list(range(1, STEPS + 1))
    expected = json.loads((finished_run / "summary.json").read_text())
    assert summary["mismatch"] == expected["mismatch"] and summary["weights_digest"] == expected["weights_digest"]
