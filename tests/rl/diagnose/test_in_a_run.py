"""A run whose engine goes wrong saves the mismatch, and the command names its cause."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import ops
from policy import transformer
from rl.actors import EngineActor
from rl.config import Recipe
from rl.diagnose.diagnosis import diagnose
from rl.diagnose.sample import load_sample
from rl.mismatch import MismatchError
from rl.monitor import read_metrics
from rl.train import run_training
from tests.rl.command import lockstep, refusal
from tests.rl.diagnose.rig import recipe_for, save_base
from tests.rl.tiny import LocalSystem, tiny_recipe


@pytest.fixture
def off_by_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine's softmax attention is a little off. The trainer may compute in another thread meanwhile."""
    here = threading.local()

    def attention(*arguments: Any) -> torch.Tensor:
        o = ops.softmax_attention(*arguments)
        return o * 1.0001 if getattr(here, "is_engine", False) else o

    def within(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            here.is_engine = True
            try:
                return method(*arguments)
            finally:
                here.is_engine = False

        return call

    overlay = SimpleNamespace(**{name: getattr(ops, name) for name in dir(ops)} | {"softmax_attention": attention})
    monkeypatch.setattr(transformer, "ops", overlay)
    for verb in ("generate", "witness"):
        monkeypatch.setattr(EngineActor, verb, within(getattr(EngineActor, verb)))


def train(folder: Path, *overrides: str) -> Path:
    """Two steps from a random policy."""
    return run(recipe_for(save_base(folder / "base"), folder, "loop.steps=2", *overrides), folder)


def run(recipe: Recipe, folder: Path) -> Path:
    run_training(recipe, folder / "run", resume=False, console=Console(width=200))
    return folder / "run"


def test_a_run_that_stops_leaves_what_the_command_needs(
    local: list[LocalSystem], off_by_a_little: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MismatchError):
        train(tmp_path)
    folder = tmp_path / "run"
    saved = folder / "mismatch" / "step-000001"
    assert (
        f"the mismatch is saved in {saved}; `lockstep diagnose {folder}` looks for its cause" in capsys.readouterr().out
    )
    result = lockstep("diagnose", folder, "--json", tmp_path / "found.json")
    assert result.exit_code == 1
    for line in ("operators", "found", "layers.1.attention.softmax_attention", "lockstep doctor"):
        assert line in result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["finding"]["name"] == "first different operator"
    assert found["finding"]["numbers"]["operator"] == "layers.1.attention.softmax_attention"
    assert found["folder"] == str(saved) and found["tokens_unequal"] > 0
    again = lockstep("diagnose", folder, "--sample", saved)
    assert again.output == result.output


@pytest.mark.slow
def test_a_run_that_goes_on_saves_the_first_mismatch(
    local: list[LocalSystem], off_by_a_little: None, tmp_path: Path
) -> None:
    folder = train(tmp_path, "loop.on_mismatch=warn")
    assert [path.name for path in (folder / "mismatch").iterdir()] == ["step-000001"]
    assert len(read_metrics(folder)) == 2


@pytest.mark.slow
def test_in_an_asynchronous_run_the_version_that_sampled_is_saved(
    local: list[LocalSystem], off_by_a_little: None, tmp_path: Path
) -> None:
    """Step 2 trains on what version 0 sampled while step 1 trained: an older version than the trainer's own."""
    rules = "monitor.alarms={mismatch/log_prob_diff_abs_mean: {above: 0.01}}"  # staleness exceeds this
    recipe = tiny_recipe(tmp_path, "loop.steps=2", "loop.max_staleness=1", "loop.on_mismatch=warn", rules)
    first, second = sorted((run(recipe, tmp_path) / "mismatch").iterdir())
    for saved, witness_version in ((first, 0), (second, 1)):
        sample, finding = load_sample(saved), diagnose(saved).finding
        assert (sample.policy_version, sample.witness_version) == (0, witness_version)
        assert finding is not None
        assert finding.numbers["operator"] == "layers.1.attention.softmax_attention"


@pytest.mark.slow
def test_a_full_disk_does_not_stop_a_run_that_would_go_on(
    local: list[LocalSystem],
    off_by_a_little: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("rl.diagnose.capture.save_sample", full)
    folder = train(tmp_path, "loop.on_mismatch=warn")
    assert "warning: the mismatch could not be saved for `lockstep diagnose`: No space left" in capsys.readouterr().out
    assert len(read_metrics(folder)) == 2


def test_there_is_nothing_to_diagnose_in_a_run_that_agrees(tmp_path: Path) -> None:
    assert "is not a run folder" in refusal("diagnose", tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    assert "has saved no mismatch" in refusal("diagnose", tmp_path)
