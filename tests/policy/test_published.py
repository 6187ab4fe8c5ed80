"""Published policies in full size on the meta device: their sizes and names, without one weight in memory."""

from typing import Any

import pytest
import torch

from policy.config import PolicyConfig
from policy.names import name_table, named_views
from policy.transformer import Policy
from tests.policy.published import FLASH, LLAMA_3_1B, LLAMA_3_8B, MINI, QWEN3_8B, QWEN3_30B_A3B


def on_meta(fields: dict[str, Any]) -> Policy:
    with torch.device("meta"):
        policy = Policy(PolicyConfig.from_hf(fields), torch.bfloat16)
    assert {tensor.device.type for tensor in (*policy.parameters(), *policy.buffers())} == {"meta"}
    return policy


@pytest.mark.parametrize(
    ("fields", "total", "active"), [(MINI, 16.42e9, 0.957e9), (FLASH, 104.18e9, 6.16e9)], ids=["mini", "flash"]
)
def test_published_sizes(fields: dict[str, Any], total: float, active: float) -> None:
    """As the reports round them: total to 10 million, active (without embeddings and head) to 1 and 10 million."""
    policy = on_meta(fields)
    assert policy.num_parameters() == pytest.approx(total, abs=0.005e9)
    assert policy.num_active_parameters() == pytest.approx(active, abs=0.0005e9 if active < 1e9 else 0.005e9)


@pytest.mark.parametrize(
    ("fields", "total"),
    [
        (QWEN3_8B, 8_190_735_360),
        (QWEN3_30B_A3B, 30_532_122_624),
        (LLAMA_3_8B, 8_030_261_248),
        (LLAMA_3_1B, 1_235_814_400),
    ],
    ids=["qwen3-8b", "qwen3-30b-a3b", "llama-3.1-8b", "llama-3.2-1b"],
)
def test_sizes_of_the_other_families(fields: dict[str, Any], total: int) -> None:
    policy = on_meta(fields)
    assert policy.num_parameters() == total
    ends = policy.config.vocab_size * policy.config.hidden_size * (1 if fields["tie_word_embeddings"] else 2)
    idle = 48 * 120 * 3 * 2048 * 768 if "num_experts" in fields else 0
    assert policy.num_active_parameters() == total - ends - idle


def test_published_tensor_names() -> None:
    """The whole list of the mini checkpoint, written down a second time from the report's table."""
    names = {"model.word_embeddings.weight", "model.norm.weight", "lm_head.weight"}
    mlp = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    for layer in range(20):
        parts = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        parts += [f"attention.{p}.weight" for p in ("query_key_value", "query_layernorm", "key_layernorm", "dense")]
        parts += [] if layer in (4, 9, 14, 19) else ["attention.g_proj.weight", "attention.g_norm.weight"]
        if layer == 0:
            parts += [f"mlp.{part}" for part in mlp]
        else:
            parts += ["mlp.gate.weight", "mlp.gate.expert_bias", *(f"mlp.shared_experts.{part}" for part in mlp)]
            parts += [f"mlp.experts.{expert}.{part}" for expert in range(256) for part in mlp]
        names |= {f"model.layers.{layer}.{part}" for part in parts}
    views = named_views(on_meta(MINI))
    assert views.keys() == names
    assert len(names) == 14_845
    assert {view.device.type for view in views.values()} == {"meta"}
    rows = [len(views[f"model.layers.{layer}.attention.query_key_value.weight"]) for layer in range(20)]
    assert rows == [6144, 6144, 6144, 6144, 3072] * 4


def test_tensor_names_of_a_mixture_without_shared_experts() -> None:
    """Of Qwen3-30B-A3B: 3, and for 48 layers 2 norms, 4 projections, q and k norm, a router and 128 experts of 3."""
    assert len(name_table(PolicyConfig.from_hf(QWEN3_30B_A3B))) == 18_867
