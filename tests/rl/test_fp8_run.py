"""A run whose policy multiplies in blockwise FP8 on both sides."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from policy.checkpoint import read_config
from rl.monitor import read_metrics
from rl.train import run_training
from rl.weight_sync import policy_digest
from tests.rl.tiny import LocalSystem, tiny_recipe

FP8 = (
    "policy.dtype=bfloat16",
    "policy.fp8_linear=true",
    "policy.config.hidden_size=128",
    "policy.config.moe_intermediate_size=64",
    "loop.steps=2",
    "evaluation.every=0",
)


@pytest.mark.usefixtures("local")
def test_trainer_and_engine_agree_in_every_bit(local: list[LocalSystem], tmp_path: Path) -> None:
    summary = run_training(tiny_recipe(tmp_path, *FP8), tmp_path / "run", resume=False, console=Console(quiet=True))
    assert summary["regime"] == "aligned"
    assert summary["mismatch"]["tokens_compared"] > 500 and summary["mismatch"]["full_vocab_rows"] > 20
    assert summary["mismatch"]["tokens_unequal"] == summary["mismatch"]["full_vocab_unequal"] == 0
    assert any((record["policy/grad_norm"] or 0) > 0 for record in read_metrics(tmp_path / "run"))
    assert policy_digest(local[0].trained) == policy_digest(local[0].sampled)
    exported = tmp_path / "run" / "policy"
    assert read_config(exported).fp8_linear
    assert json.loads((exported / "config.json").read_text())["lockstep"]["fp8_linear"] is True
