"""A run that trains adapters: sampler and learner agree, a killed run goes on, exports hold what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from policy.checkpoint import load_policy
from policy.names import export_tensors
from rl.base_policy import cache_folder
from rl.config import load_recipe
from rl.train import run_training
from tests.rl.command import lockstep, refusal
from tests.rl.tiny import LocalSystem, full_disk_at, tiny_recipe, write_recipe

LORA = "lora={rank: 4, alpha: 8, targets: [query_key_value, dense, gate_proj, up_proj, down_proj]}"
OPTIONS = (LORA, "policy.dtype=bfloat16", "trainer.learning_rate=0.02", "evaluation.every=0")


def run(folder: Path, resume: bool = False) -> dict[str, Any]:
    folder.parent.mkdir(exist_ok=True)
    return run_training(tiny_recipe(folder.parent, *OPTIONS), folder, resume, Console(quiet=True))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Path:
    """A finished run. To be read only."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base_cache))
        patch.setattr("rl.train.System", LocalSystem)
        run(folder)
    return folder


def test_sampler_and_learner_agree_while_the_adapters_learn(lora_run: Path) -> None:
    summary = json.loads((lora_run / "summary.json").read_text())
    mismatch = summary["mismatch"]
    assert mismatch["tokens_compared"] > 500 and mismatch["full_vocab_rows"] > 20
    assert (mismatch["tokens_unequal"], mismatch["full_vocab_unequal"]) == (0, 0)
    assert summary["parameters"] == load_policy(lora_run / "policy").num_parameters()


def test_a_checkpoint_holds_adapters_and_no_frozen_weight(lora_run: Path) -> None:
    (*_, newest) = sorted((lora_run / "checkpoints").iterdir())
    names = [name for name in load_file(newest / "trainer.safetensors") if name.startswith("policy.")]
    kept = {name.rpartition(".")[2] for name in names}
    assert kept == {"lora_A", "lora_B", "expert_bias"}


def test_a_killed_run_goes_on_to_the_same_weights(
    local: list[LocalSystem], lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("trainer.state._write_file", full_disk_at("trainer.state._write_file", call=5))
        run(tmp_path / "run")
    resumed = run(tmp_path / "run", resume=True)
    assert resumed["weights_digest"] == json.loads((lora_run / "summary.json").read_text())["weights_digest"]


def test_exports(lora_run: Path, tmp_path: Path, base_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base and the adapter make the merged policy, which differs from the base in the targets alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(base_cache))
    out, adapter = tmp_path / "merged", tmp_path / "adapter"
    result = lockstep("export", lora_run, "--out", out, "--adapter", adapter, "--verify")
    assert result.exit_code == 0, result.output
    digest = json.loads((lora_run / "summary.json").read_text())["weights_digest"]
    assert f"adapter after 4 steps in {adapter}" in result.stdout and digest in result.stdout
    assert "equal those of the checkpoint in every bit" in result.stdout
    base_path = cache_folder(load_recipe(lora_run / "recipe.yaml"))
    content = json.loads((adapter / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(base_path)
    base, exported = (export_tensors(load_policy(folder, torch.bfloat16)) for folder in (base_path, out))
    stored = load_file(adapter / "adapter_model.safetensors")
    assert len(stored) == 2 * len(content["target_modules"]) == 2 * 2 * 5
    for module in content["target_modules"]:
        a, b = (stored[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        expected = (base[f"{module}.weight"].float() + 2.0 * (b @ a)).bfloat16()
        assert b.any() and torch.equal(exported.pop(f"{module}.weight"), expected)
    assert exported and all(torch.equal(tensor, base[name]) for name, tensor in exported.items())


def test_a_run_without_adapters_has_none_to_export(finished_run: Path, tmp_path: Path) -> None:
    message = refusal("export", finished_run, "--out", tmp_path / "out", "--adapter", tmp_path / "adapter")
    assert message == f"{finished_run} trained every weight, so there is no adapter; leave out --adapter"
    assert not any(tmp_path.iterdir())


def test_a_target_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    wrong = "lora={rank: 4, alpha: 8, targets: [q_proj]}"
    message = refusal("train", recipe, wrong, "--run-dir", tmp_path / "run")
    assert message.startswith("lora.targets: q_proj: a bailing_moe_linear policy can be adapted in dense, ")
    assert list(tmp_path.iterdir()) == [recipe]
