"""PolicyConfig: what it accepts, what it derives, and the config.json it comes from and goes to."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from policy.config import FIXED_FIELDS, PolicyConfig
from policy.names import name_table
from policy.transformer import Policy
from tests.policy.tiny import make_config

MINI: dict[str, Any] = {
    "architectures": ["BailingMoeLinearV2ForCausalLM"],
    "model_type": "bailing_moe_linear",
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
    "linear_silu": False,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "use_rmsnorm": True,
    "hidden_act": "silu",
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "use_bias": False,
    "use_qkv_bias": False,
    "tie_word_embeddings": False,
    "vocab_size": 157184,
    "eos_token_id": 156892,
    "pad_token_id": 156892,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.56.1",
    "use_cache": True,
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


@pytest.mark.parametrize(("fields", "billions"), [(MINI, 16.42), (FLASH, 104.18)])
def test_published_sizes(fields: dict[str, Any], billions: float) -> None:
    with torch.device("meta"):
        policy = Policy(PolicyConfig.from_hf(fields), torch.bfloat16)
    assert round(policy.num_parameters() / 1e9, 2) == billions


def test_published_tensor_names() -> None:
    table = name_table(PolicyConfig.from_hf(MINI))
    assert len(table) == 14_845
    assert "model.layers.19.mlp.experts.255.down_proj.weight" in table
    assert "model.layers.4.attention.g_proj.weight" not in table  # a softmax layer


@pytest.mark.parametrize("fields", [MINI, FLASH])
def test_config_json_round_trip(fields: dict[str, Any]) -> None:
    config = PolicyConfig.from_hf(fields)
    written = config.to_hf("bfloat16")
    assert PolicyConfig.from_hf(written) == config
    assert {name: written[name] for name in fields.keys() & written.keys()} == {
        name: value for name, value in fields.items() if name not in ("transformers_version", "use_cache")
    }
    assert written["lockstep"] == {"chunk_size": 64, "decay_layer_index": "engine"}


def test_own_fields_round_trip() -> None:
    config = make_config(chunk_size=32, decay_layer_index="hf")
    assert PolicyConfig.from_hf(config.to_hf("float32")) == config


@pytest.mark.parametrize(
    ("layers", "group", "softmax"),
    [(20, 5, [4, 9, 14, 19]), (32, 8, [7, 15, 23, 31]), (11, 4, [3, 7, 8, 9, 10]), (3, 4, [0, 1, 2])],
)
def test_softmax_layers_close_each_group_and_fill_the_tail(layers: int, group: int, softmax: list[int]) -> None:
    config = PolicyConfig(vocab_size=9, num_hidden_layers=layers, layer_group_size=group)
    assert [layer for layer in range(layers) if config.is_softmax(layer)] == softmax
    assert [config.kv_heads(layer) for layer in softmax] == [2] * len(softmax)


def test_decay_slopes_of_sixteen_heads() -> None:
    """s from 2^-0.5 to 2^-8. f of layer 0 and 18 of 20: 1 and 1/19, one layer later under the other convention."""
    engine = PolicyConfig.from_hf(MINI)
    hf = dataclasses.replace(engine, decay_layer_index="hf")
    for config, factors in ((engine, {0: 1.0, 18: 1 / 19}), (hf, {0: 1 + 1 / 19, 18: 2 / 19})):
        for layer, factor in factors.items():
            slopes = config.decay_slopes(layer)
            assert len(slopes) == 16
            assert slopes[0] == pytest.approx(0.70710678 * (factor + 1e-5))
            assert slopes[1] == pytest.approx(0.5 * (factor + 1e-5))
            assert slopes[15] == pytest.approx(2**-8 * (factor + 1e-5))


def test_slowest_head_half_life() -> None:
    """Layer 18 of 20: 3371 tokens under the engine convention, 1686 under the other."""
    engine = PolicyConfig.from_hf(MINI)
    lives = [
        math.log(2) / dataclasses.replace(engine, decay_layer_index=convention).decay_slopes(18)[-1]
        for convention in ("engine", "hf")
    ]
    assert [round(life) for life in lives] == [3371, 1686]


def test_decay_slopes_of_other_head_counts() -> None:
    """32 heads start at 2^-0.25. Six: the four of H = 4, then the first and third of H = 8."""
    assert PolicyConfig.from_hf(FLASH).decay_slopes(0)[0] == pytest.approx(0.84089642 * (1 + 1e-5))
    six = PolicyConfig(vocab_size=9, num_attention_heads=6).decay_slopes(0)
    assert six == pytest.approx([s * (1 + 1e-5) for s in (2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3)])


CONTRADICTIONS = [
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads"),
    ({"group_norm_size": 3}, "group_norm_size must divide heads x head_dim"),
    ({"head_dim": 12}, "head_dim must be a multiple of 8"),
    ({"head_dim": 8, "partial_rotary_factor": 0.4}, "must be even and at most head_dim"),
    ({"partial_rotary_factor": 1.5}, "must be even and at most head_dim"),
    ({"partial_rotary_factor": 0.0}, "must be even and at most head_dim"),
    ({"n_group": 3}, "n_group must divide num_experts"),
    ({"n_group": 2, "topk_group": 3}, "topk_group must not exceed n_group"),
    ({"n_group": 8}, "an expert group needs at least 2 experts"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok exceeds the experts in the kept groups"),
    ({"n_group": 4, "num_experts_per_tok": 3}, "num_experts_per_tok exceeds the experts in the kept groups"),
    ({"num_shared_experts": 2}, "num_shared_experts must be 1"),
    ({"chunk_size": 8}, "chunk_size must be a power of two, at least 16"),
    ({"chunk_size": 48}, "chunk_size must be a power of two, at least 16"),
    ({"decay_layer_index": "mlx"}, "decay_layer_index must be engine or hf"),
    ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
    ({"layer_group_size": 0}, "layer_group_size must be at least 1, got 0"),
    ({"n_group": 0}, "n_group must be at least 1, got 0"),
]


@pytest.mark.parametrize(("fields", "rule"), CONTRADICTIONS, ids=[rule for _, rule in CONTRADICTIONS])
def test_contradiction_is_named(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        PolicyConfig(**({"vocab_size": 9} | fields))


@pytest.mark.parametrize("name", sorted(FIXED_FIELDS))
def test_field_that_the_family_fixes(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = 'other', but this family has"):
        PolicyConfig.from_hf(MINI | {name: "other"})


def test_every_problem_is_listed() -> None:
    fields = {"hidden_act": "gelu", "sliding_window": 4096, "use_mrope": True, "lockstep": {"block_size": 4}}
    with pytest.raises(ValueError) as error:
        PolicyConfig.from_hf(fields)
    for problem in (
        "hidden_act = 'gelu', but this family has 'silu'",
        "unknown field sliding_window",
        "unknown field use_mrope",
        "unknown field lockstep.block_size",
        "vocab_size is missing",
    ):
        assert problem in str(error.value)


def test_own_fields_belong_under_their_key() -> None:
    with pytest.raises(ValueError, match="unknown field chunk_size"):
        PolicyConfig.from_hf(MINI | {"chunk_size": 64})


def test_redundant_rotary_dim_must_agree() -> None:
    assert PolicyConfig.from_hf(MINI | {"rotary_dim": 64}) == PolicyConfig.from_hf(MINI)
    with pytest.raises(ValueError, match="rotary_dim = 128, but head_dim x partial_rotary_factor gives 64"):
        PolicyConfig.from_hf(MINI | {"rotary_dim": 128})
