"""`lockstep plan`: the published sizes of Ring-linear, memory worked out by hand, and what to change where it is too
little."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from policy.config import PolicyConfig
from policy.transformer import Policy
from rl.base_policy import planned_config
from rl.plan import Needs, activation_bytes, count_needs, recipe_to_plan
from rl.plan_report import parse_memory
from tests.rl.command import lockstep, refusal
from tests.rl.tiny import tiny_recipe, write_recipe

MINI: dict[str, Any] = {
    "model_type": "bailing_moe_linear",
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "moe_shared_expert_intermediate_size": 512,
    "num_hidden_layers": 20,
    "layer_group_size": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "group_norm_size": 4,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
FLASH = MINI | {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "moe_shared_expert_intermediate_size": 1024,
    "num_hidden_layers": 32,
    "layer_group_size": 8,
    "num_attention_heads": 32,
    "group_norm_size": 8,
}


def write_config(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def needs_of(folder: Path, fields: dict[str, Any]) -> Needs:
    recipe = recipe_to_plan(write_config(folder, fields), [])
    return count_needs(recipe, planned_config(recipe, None))


@pytest.mark.parametrize(
    ("fields", "total", "active", "state_mib"),
    [(MINI, 16_423_443_456, 956_947_456, 16.0), (FLASH, 104_181_657_600, 6_156_578_816, 56.0)],
    ids=["mini", "flash"],
)
def test_published_sizes_of_ring_linear(
    tmp_path: Path, fields: dict[str, Any], total: int, active: int, state_mib: float
) -> None:
    needs = needs_of(tmp_path, fields)
    assert (needs.parameters, needs.active_parameters, needs.trainable_parameters) == (total, active, total)
    assert (needs.state_per_request / 2**20, needs.kv_per_token / 2**10) == (state_mib, 8.0)
    # FP32 masters and gradients, two FP32 moments; BF16 for the products and in the engine.
    assert (needs.weights, needs.gradients) == (4 * total, 4 * total)
    assert 8 * total <= needs.optimizer < 8 * total + 4096
    assert (needs.copies, needs.engine_weights) == (2 * total, 2 * total)


NEEDS = Needs(
    parameters=0,
    active_parameters=0,
    trainable_parameters=0,
    weights=400,
    gradients=400,
    optimizer=800,
    copies=200,
    layer=10,
    activations=30,
    engine_weights=160,
    engine_cache=40,
    state_per_request=0,
    open_chunk_per_request=0,
    kv_per_token=0,
)


def test_what_each_gpu_holds() -> None:
    assert NEEDS.trainer(1) == 1600 + 200 + 30
    assert NEEDS.trainer(8) == 1600 / 8 + 2 * 10 + 30
    assert (NEEDS.engine(1), NEEDS.engine(4)) == (200, 50)


@pytest.mark.parametrize(("memory", "split"), [(500, 1), (499, 2), (389, 2), (388, 4), (306, 8), (305, None)])
def test_an_engine_is_split_no_further_than_needed(memory: int, split: int | None) -> None:
    """The trainer takes 250 on each of 8, the engine 200, 100, 50 or 25; nine tenths of the memory are usable."""
    assert NEEDS.split(8, memory) == split


def test_a_third_of_the_gpus_cannot_hold_an_engine_each() -> None:
    """Of 6 GPUs, 1 or 2 make an engine; 4 do not go into them."""
    needs = replace(NEEDS, engine_weights=1000)
    assert needs.trainer(6) == 317 and needs.split(6, (317 + 520) * 10 // 9) == 2
    assert needs.split(6, (317 + 260) * 10 // 9 + 1) is None


def test_flash_does_not_fit_on_eight_h200_unless_adapters_are_trained(tmp_path: Path) -> None:
    result = lockstep("plan", write_config(tmp_path, FLASH), "--gpus", 8, "--gpu-memory", "141GB")
    assert result.exit_code == 0, result.output
    for line in (
        "parameters: 104,181,657,600 in 32 layers, all of them trained",
        "56.0 MiB of states, 28.0 MiB of open chunks, 8.0 KiB of keys and values for each token",
        "does not fit on 8 GPUs of 141.0 GB",
        "  lora={rank: 16, alpha: 32, targets: [query_key_value, dense]} with trainer.token_budget=4096",
        "  24 GPUs with trainer.token_budget=1024",
    ):
        assert line in result.stdout
    # 416.7 + 416.7 + 833.5 GB over 8.
    assert all(f" {share} " in result.stdout for share in ("52.1", "104.2", "126.9"))


def test_mini_fits_on_eight_and_an_engine_on_one_of_them(tmp_path: Path) -> None:
    output = lockstep("plan", write_config(tmp_path, MINI) / "config.json", "--gpus", 8).stdout
    assert "\nfits on 8 GPUs of 141.0 GB\nnote: this release trains in one process" in output


def test_a_recipe_is_planned_with_its_overrides(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert "fits on 1 GPU of 24.0 GB" in lockstep("plan", recipe, "--gpu-memory", "24 GB").stdout
    output = lockstep("plan", recipe, "rollout.max_batch=4096").stdout
    assert "rollout.memory_mb = 32 is too little for rollout.max_batch = 4096 sequences of 168 tokens" in output
    before = set(tmp_path.rglob("*"))
    assert "does not fit on 1 GPU of 0.010 GB" in lockstep("plan", recipe, "--gpu-memory", "0.01GB").stdout
    assert set(tmp_path.rglob("*")) == before


def test_adapters_shrink_gradients_and_optimizer(tmp_path: Path) -> None:
    """Two layers, query_key_value: softmax 64 + 2 x 32 rows of 32, lightning 3 x 64 rows of 32; rank 2."""
    recipe = tiny_recipe(tmp_path, "lora={rank: 2, alpha: 4, targets: [query_key_value]}", "policy.dtype=bfloat16")
    config = planned_config(recipe, None)
    needs, plain = count_needs(recipe, config), count_needs(recipe.model_copy(update={"lora": None}), config)
    trained = 2 * (32 + 128) + 2 * (32 + 192)
    assert (needs.trainable_parameters, needs.gradients) == (trained, 4 * trained)
    assert needs.parameters == plain.parameters and needs.weights == 2 * plain.parameters + 4 * trained
    assert needs.copies == 2 * 32 * (128 + 192)


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", "0GB", "141TB"])
def test_a_size_that_cannot_be_read(tmp_path: Path, size: str) -> None:
    message = refusal("plan", write_recipe(tmp_path), f"--gpu-memory={size}")
    assert message == f"--gpu-memory {size!r}: give a size such as 141GB or 80GiB"
    assert (parse_memory("141GB"), parse_memory("80 gib"), parse_memory("0.5GB")) == (
        141 * 10**9,
        80 * 2**30,
        5 * 10**8,
    )


def test_what_is_neither_recipe_nor_policy(tmp_path: Path) -> None:
    assert refusal("plan", tmp_path / "nowhere").startswith(
        f"{tmp_path}/nowhere is not a policy: it has no config.json"
    )
    folder = write_config(tmp_path, MINI)
    assert refusal("plan", folder, "loop.steps=9").startswith(f"loop.steps=9: {folder} is no recipe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind",
    [
        {"layer_group_size": 4},
        {"layer_group_size": 1, "first_k_dense_replace": 4},
        {"layer_group_size": 5, "num_hidden_layers": 5, "moe_intermediate_size": 128, "num_experts": 4},
    ],
    ids=["mixed", "softmax dense", "wide experts"],
)
def test_activations_are_what_the_forward_keeps(kind: dict[str, int], dtype: torch.dtype) -> None:
    """Bytes kept for backward on the CPU path, where q, k and v are FP32, in the slope over the number of tokens."""
    config = PolicyConfig(vocab_size=64, hidden_size=96, chunk_size=32, **kind)
    policy = Policy(config, dtype)
    policy.initialize(0)
    measured = (_kept_bytes(policy, 1024) - _kept_bytes(policy, 512)) / 512
    assert activation_bytes(config, dtype, torch.float32) == pytest.approx(measured, rel=0.1)


def _kept_bytes(policy: Policy, tokens: int) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*policy.parameters(), *policy.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    layout = ops.ChunkLayout.build([tokens], policy.config.chunk_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(torch.arange(tokens) % policy.config.vocab_size, layout)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
