"""What vLLM finds of the plugin without a model."""

import importlib
import tomllib
from pathlib import Path

from policy.config import PolicyConfig
from policy.families import RING_LINEAR
from rollout.vllm_plugin import HYBRID_CLASS, register
from rollout.vllm_plugin.config import RingLinearConfig

ROOT = Path(__file__).parents[3]


def test_the_entry_point_of_the_package_is_register() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, name = declared["lockstep"].split(":")
    assert getattr(importlib.import_module(module), name) is register


def test_the_class_for_ring_linear_is_the_one_that_its_exports_ask_for() -> None:
    assert PolicyConfig(vocab_size=8).to_hf("bfloat16")["architectures"] == [HYBRID_CLASS]


def test_layers_with_keys_and_values_are_those_of_softmax_attention() -> None:
    config = RingLinearConfig(num_hidden_layers=5, layer_group_size=2, hidden_size=64)
    assert config.layers_block_type == ["mamba", "attention", "mamba", "attention", "attention"]
    assert (config.model_type, config.hidden_size) == (RING_LINEAR, 64)
