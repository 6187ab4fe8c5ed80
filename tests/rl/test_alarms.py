"""Alarms: when they sound, which ones a recipe has, and what a run does when one sounds."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rl.alarms import ON_ALARM, AlarmError, Alarms, alarm_rules
from rl.events import read_events
from rl.mismatch import MismatchError
from rl.monitor import read_metrics
from rl.monitor_config import AlarmConfig
from rl.train import _refuse_changes
from rl.weight_sync import policy_digest
from rollout.request import Completion, Request
from tests.rl.test_train import summary_of, train
from tests.rl.tiny import LocalSystem, tiny_recipe
from trainer.state import latest_checkpoint

K3 = "mismatch/k3"
UNALIGNED = ("loop.on_mismatch=warn", "ops.fast=[linear]")


def texts(alarms: Alarms, *values: float) -> list[list[str]]:
    return [[alarm.text for alarm in alarms.observe({K3: value})] for value in values]


def test_an_alarm_sounds_again_only_after_it_has_been_quiet() -> None:
    alarms = Alarms({K3: AlarmConfig(above=0.05)})
    said = ["mismatch/k3 is 0.06, above 0.05"]
    assert texts(alarms, 0.05, 0.06, 0.07, 0.01, 0.06) == [[], said, [], [], said]


def test_both_bounds_and_what_is_no_number() -> None:
    rule = AlarmConfig(above=2, below=1)
    assert texts(Alarms({K3: rule}), 1, 2, 0.5) == [[], [], ["mismatch/k3 is 0.5, below 1"]]
    for value in (math.nan, math.inf, -math.inf):
        assert texts(Alarms({K3: AlarmConfig(above=2)}), value) == [
            [f"mismatch/k3 is {value}, which is no finite number"]
        ]


def test_an_alarm_that_stops_sounds_at_every_step() -> None:
    """Whoever goes on after a stop, with the cause still there, is stopped again."""
    alarms = Alarms({K3: AlarmConfig(above=1, action="stop")})
    assert [len(found) for found in texts(alarms, 2, 2)] == [1, 1]


def test_how_many_sound_is_a_metric_and_a_missing_metric_says_nothing() -> None:
    alarms = Alarms({K3: AlarmConfig(above=1), "reward/mean": AlarmConfig(below=0)})
    assert [alarm.metric for alarm in alarms.observe({K3: 2.0, "reward/mean": 0.5})] == [K3]
    assert alarms.metrics() == {"monitor/alarms": 1.0}
    assert alarms.observe({"reward/mean": 0.5}) == []
    assert alarms.metrics() == {"monitor/alarms": 1.0}
    assert alarms.unseen({"reward/mean": 0.5}) == [K3]


def test_a_resumed_run_has_the_alarms_of_its_record() -> None:
    """What was not finite is recorded as None."""
    rules = {K3: AlarmConfig(above=1, action="correct"), "reward/mean": AlarmConfig(below=0)}
    resumed = Alarms(rules)
    assert not resumed.corrects
    resumed.restore([{"step": 1, K3: None, "reward/mean": 1.0}, {"step": 2, K3: 0.0, "reward/mean": -1.0}])
    assert resumed.corrects
    assert resumed.observe({"reward/mean": -1.0}) == []
    assert [alarm.metric for alarm in resumed.observe({K3: 2.0})] == [K3]


def test_the_default_alarms(tmp_path: Path) -> None:
    stop, warn, far = AlarmConfig(above=0, action="stop"), AlarmConfig(above=0), AlarmConfig(above=0.05)
    promised = ("mismatch/tokens_unequal", "mismatch/full_vocab_unequal")
    measured = (K3, "mismatch/log_prob_diff_abs_mean")
    assert alarm_rules(tiny_recipe(tmp_path)) == dict.fromkeys(promised, stop)
    assert alarm_rules(tiny_recipe(tmp_path, "loop.on_mismatch=warn")) == dict.fromkeys(promised, warn)
    assert alarm_rules(tiny_recipe(tmp_path, *UNALIGNED)) == dict.fromkeys(measured, far)
    stale = alarm_rules(tiny_recipe(tmp_path, "loop.max_staleness=1"))
    assert stale == dict.fromkeys(promised, stop) | dict.fromkeys(measured, far)


def test_a_recipe_changes_and_removes_default_alarms(tmp_path: Path) -> None:
    alarms = "monitor.alarms={mismatch/k3: {above: 0.5, action: stop}, mismatch/log_prob_diff_abs_mean: null}"
    assert alarm_rules(tiny_recipe(tmp_path, *UNALIGNED, alarms)) == {K3: AlarmConfig(above=0.5, action="stop")}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "monitor.alarms.mismatch/k33.above=1",
            "monitor.alarms: no metric 'mismatch/k33': did you mean 'mismatch/k3'?",
        ),
        ("monitor.alarms.mismatch/k3.abvoe=1", "did you mean 'monitor.alarms.mismatch/k3.above'?"),
        ("monitor.alarms.mismatch/k3.action=stop", "monitor.alarms.mismatch/k3: an alarm needs a bound"),
        ("monitor.alarms.mismatch/k3={above: 1, below: 2}", "above = 1.0 is less than below = 2.0"),
        ("monitor.alarms.mismatch/tokens_unequal.above=9", "is decided by loop.on_mismatch"),
        ("monitor.alarms.train/tis.above=9", "'train/tis' is a metric of slime: add slime to monitor.names"),
        ("monitor.names=[verl, verl-2026-01]", "monitor.names: verl and verl-2026-01 give the same names"),
    ],
)
def test_what_an_alarm_cannot_be_is_said(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        tiny_recipe(tmp_path, override)
    assert said in str(error.value)


def test_correction_that_is_on_already_cannot_be_switched_on(tmp_path: Path) -> None:
    correct = "monitor.alarms.mismatch/k3={above: 1, action: correct}"
    with pytest.raises(
        ValueError, match=r"mismatch/k3 would switch trainer.correction on, but it is on from the start"
    ):
        tiny_recipe(tmp_path, correct, "trainer.correction.method=icepop")
    with pytest.raises(ValueError, match=r"needs the trainer's own old log-probs"):
        tiny_recipe(tmp_path, correct, "trainer.old_log_probs=rollout")


def far_from(step: int, last: int) -> Callable[..., list[Completion]]:
    """An engine that records one log-prob 0.5 too low in each completion of the steps step .. last."""
    generate = LocalSystem.generate

    def generate_far(self: LocalSystem, requests: list[Request]) -> list[Completion]:
        completions = generate(self, requests)
        return [_far(each) for each in completions] if step <= requests[0].step <= last else completions

    return generate_far


def _far(completion: Completion) -> Completion:
    log_probs = completion.log_probs.copy()
    log_probs[0] -= np.float32(0.5)
    return replace(completion, log_probs=log_probs)


def events_of(run: Path) -> list[tuple[int, str]]:
    return [(event.step, event.kind) for event in read_events(run)]


def test_an_alarm_that_warns_is_said_recorded_and_goes_on(
    local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LocalSystem, "generate", far_from(1, 2))
    alarm = "monitor.alarms={mismatch/log_prob_diff_max: {above: 0.4}, mismatch/expert_agreement/layer_0: {below: 1}}"
    run = train(tmp_path, "loop.steps=2", "loop.on_mismatch=warn", alarm, console=Console(width=300))
    out = capsys.readouterr().out
    assert out.count("warning: mismatch/log_prob_diff_max is 0.5, above 0.4") == 1
    assert out.count("warning: trainer and engine disagree on ") == 1
    assert out.count("monitor.alarms watches mismatch/expert_agreement/layer_0, which this step did not measure") == 1
    assert [record["monitor/alarms"] for record in read_metrics(run)] == [2, 2]
    assert events_of(run) == [(1, "alarm"), (1, "alarm")]


@pytest.mark.slow
def test_an_alarm_that_stops_leaves_a_checkpoint_from_before_the_step(
    finished_run: Path, local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run goes on from it as if it had never stopped, once the recipe allows it and the engine is well."""
    options = ("loop.checkpoint_every=4", "loop.on_mismatch=warn")
    alarm = "monitor.alarms.mismatch/k3={above: 1.0e-4, action: stop}"
    with monkeypatch.context() as patch:
        patch.setattr(LocalSystem, "generate", far_from(3, 3))
        with pytest.raises(
            AlarmError, match=r"mismatch/k3 is 0\.\d+, above 0.0001, for which monitor.alarms says stop"
        ):
            train(tmp_path, *options, alarm)
    run = tmp_path / "run"
    assert summary_of(run)["status"] == "failed"
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None and newest.name.endswith("2")
    assert policy_digest(local[0].trained) == policy_digest(local[0].sampled)
    assert [record["step"] for record in read_metrics(run)] == [1, 2]
    train(tmp_path, *options, resume=True)
    assert summary_of(run)["weights_digest"] == summary_of(finished_run)["weights_digest"]
    assert events_of(run) == [(3, "alarm"), (3, "alarm"), (2, "resume")]


def test_an_alarm_known_only_after_the_update_stops_with_that_step_kept(
    local: list[LocalSystem], tmp_path: Path
) -> None:
    alarm = "monitor.alarms.policy/learning_rate={above: 0, action: stop}"
    with pytest.raises(
        AlarmError, match=r"learning_rate is 0.001, .* weights after 1 steps are in the newest checkpoint"
    ):
        train(tmp_path, "loop.checkpoint_every=4", alarm)
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name.endswith("1")
    assert [record["monitor/alarms"] for record in read_metrics(tmp_path / "run")] == [1]


def test_a_broken_promise_stops_at_the_first_step_with_no_checkpoint(
    local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalSystem, "generate", far_from(1, 1))
    with pytest.raises(MismatchError, match=r"trainer and engine disagree on .*No weight was changed"):
        train(tmp_path)
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is None
    assert events_of(tmp_path / "run") == [(1, "alarm")]


def corrections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records what the system is asked to correct with, and passes it on."""
    asked, original = [], LocalSystem.set_correction

    def set_correction(self: LocalSystem, correction: Any) -> None:
        asked.append(correction)
        original(self, correction)

    monkeypatch.setattr(LocalSystem, "set_correction", set_correction)
    return asked


CORRECT = ("loop.on_mismatch=warn", "monitor.alarms.mismatch/k3={above: 1.0e-4, action: correct}")


@pytest.mark.slow
def test_an_alarm_that_corrects_switches_the_correction_on_for_good(
    local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalSystem, "generate", far_from(2, 3))
    asked = corrections(monkeypatch)
    run = train(tmp_path, *CORRECT)
    assert asked == [ON_ALARM] and ON_ALARM.method == "token_tis"
    assert events_of(run) == [(2, "alarm"), (2, "alarm"), (2, "correction")]
    weights = [record.get("correction/weight_mean") for record in read_metrics(run)]
    assert weights[:2] == [None, None] and (weights[2] or 0) > 1 and weights[3] == 1


@pytest.mark.slow
def test_a_resumed_run_corrects_as_the_whole_one_does(
    local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalSystem, "generate", far_from(2, 3))
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole", *CORRECT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rl.loop.save_rollouts", interrupted_at(3))
        train(tmp_path / "cut", *CORRECT)
    asked = corrections(monkeypatch)
    train(tmp_path / "cut", *CORRECT, resume=True)
    assert asked == [ON_ALARM]
    assert summary_of(tmp_path / "cut" / "run")["weights_digest"] == summary_of(whole)["weights_digest"]


def interrupted_at(step: int) -> Callable[..., None]:
    def write(path: Path, at: int, *rest: Any) -> None:
        if at == step:
            raise KeyboardInterrupt

    return write


def test_resume_refuses_other_alarms_that_correct(tmp_path: Path) -> None:
    started, correcting = tiny_recipe(tmp_path), tiny_recipe(tmp_path, CORRECT[1])
    with pytest.raises(ValueError, match=r"Different: monitor\.alarms: those with action correct"):
        _refuse_changes(tmp_path, started, correcting)
    _refuse_changes(tmp_path, started, tiny_recipe(tmp_path, "monitor.alarms.mismatch/k3={above: 1}"))
