"""PolicyConfig: what it accepts, what it derives, and the config.json it comes from and goes to."""

import dataclasses
import json
import math
from typing import Any

import pytest

from policy.config import PolicyConfig
from policy.families import FAMILIES, RING_LINEAR
from policy.rope import Llama3Scaling
from tests.policy.published import FLASH, LLAMA_3_8B, MINI, PUBLISHED, QWEN3_8B, QWEN3_30B_A3B
from tests.policy.tiny import FIELDS, family_config, make_config


@pytest.mark.parametrize("fields", PUBLISHED)
def test_config_json_round_trip(fields: dict[str, Any]) -> None:
    config = PolicyConfig.from_hf(fields)
    written = config.to_hf("bfloat16")
    assert PolicyConfig.from_hf(written) == config
    unshaped = {"transformers_version", "use_cache", "bos_token_id", "sliding_window", "max_window_layers"}
    unshaped |= {"output_router_logits", "router_aux_loss_coef"}
    assert {name: written[name] for name in fields if name in written} == {
        name: value for name, value in fields.items() if name not in unshaped
    }
    ring = fields["model_type"] == RING_LINEAR
    assert written["lockstep"] == {"chunk_size": 64, "fp8_linear": False} | (
        {"decay_layer_index": "engine"} if ring else {}
    )
    assert json.loads(json.dumps(written)) == written


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
    ({"num_shared_experts": 2}, "num_shared_experts must be 0 or 1"),
    ({"chunk_size": 8}, "chunk_size must be a power of two, at least 16"),
    ({"chunk_size": 48}, "chunk_size must be a power of two, at least 16"),
    ({"decay_layer_index": "mlx"}, "decay_layer_index must be engine or hf"),
    ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
    ({"layer_group_size": 0}, "layer_group_size must be at least 1, got 0"),
    ({"n_group": 0}, "n_group must be at least 1, got 0"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must not be negative"),
    ({"hidden_size": "128"}, "hidden_size must be a whole number, got '128'"),
    ({"num_experts": True}, "num_experts must be a whole number, got True"),
    ({"rope_theta": "1e6"}, "rope_theta must be a number, got '1e6'"),
    (
        {"model_type": "mamba"},
        "model_type = 'mamba' cannot be built; the families are bailing_moe_linear, llama, qwen3",
    ),
    ({"use_qk_norm": False}, "use_qk_norm = False, but every bailing_moe_linear policy has True"),
    ({"mlp_only_layers": (1,)}, r"mlp_only_layers = \(1,\), but every bailing_moe_linear policy has \(\)"),
    ({"model_type": "llama"}, "layer_group_size = 4, but every llama policy has 1"),
]


@pytest.mark.parametrize(("fields", "rule"), CONTRADICTIONS, ids=[rule for _, rule in CONTRADICTIONS])
def test_contradiction_is_named(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        PolicyConfig(**({"vocab_size": 9} | fields))


FIXED = [
    (fields, name)
    for fields in (MINI, QWEN3_8B, QWEN3_30B_A3B, LLAMA_3_8B)
    for name in FAMILIES[fields["model_type"]].fixed
    if name not in ("model_type", "num_nextn_predict_layers")
]


@pytest.mark.parametrize(("fields", "name"), FIXED, ids=[f"{fields['model_type']}-{name}" for fields, name in FIXED])
def test_field_that_the_family_fixes(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = 'other', but this family has"):
        PolicyConfig.from_hf(fields | {name: "other"})


def test_layers_that_predict_further_tokens_are_read_and_not_exported() -> None:
    config = PolicyConfig.from_hf(MINI | {"num_nextn_predict_layers": 1})
    assert config.num_nextn_predict_layers == 1
    assert config.to_hf("bfloat16")["num_nextn_predict_layers"] == 0


REFUSED = [
    (
        QWEN3_8B | {"model_type": "qwen2"},
        "model_type = 'qwen2' cannot be built; the families are bailing_moe_linear, llama",
    ),
    (QWEN3_8B | {"use_sliding_window": True}, "use_sliding_window = True, but this family has False"),
    (QWEN3_8B | {"attention_bias": True}, "attention_bias = True, but this family has False"),
    (LLAMA_3_8B | {"mlp_bias": True}, "mlp_bias = True, but this family has False"),
    (QWEN3_8B | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .* only full_attention"),
    (QWEN3_8B | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn': only llama3"),
    (QWEN3_8B | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn': only llama3"),
    (
        LLAMA_3_8B | {"rope_scaling": {"type": "llama3", "factor": 8.0}},
        "rope_scaling of type llama3 needs just the numbers factor, ",
    ),
    (LLAMA_3_8B | {"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta = 500000.0 here and 10000.0 there"),
    (LLAMA_3_8B | {"rope_scaling": LLAMA_3_8B["rope_scaling"] | {"factor": "8"}}, "needs just the numbers factor, "),
    (LLAMA_3_8B | {"rope_scaling": LLAMA_3_8B["rope_scaling"] | {"beta": 8}}, "needs just the numbers factor, .*beta"),
    (LLAMA_3_8B | {"rope_parameters": "llama3"}, "rope_parameters = 'llama3' is not an object"),
    (QWEN3_30B_A3B | {"num_local_experts": 64}, "num_experts = 128 here and 64 there"),
    (QWEN3_8B | {"eos_token_id": None}, "eos_token_id is missing"),
    ({k: v for k, v in QWEN3_8B.items() if k != "head_dim"}, "head_dim is missing"),
    (QWEN3_8B | {"num_experts": 8}, "unknown field num_experts"),
    (LLAMA_3_8B | {"sliding_window": 4096}, "unknown field sliding_window"),
    (LLAMA_3_8B | {"lockstep": {"decay_layer_index": "hf"}}, "unknown field lockstep.decay_layer_index"),
    (QWEN3_30B_A3B | {"mlp_only_layers": [48]}, "mlp_only_layers must lie within num_hidden_layers"),
    (QWEN3_30B_A3B | {"num_experts_per_tok": 129}, "num_experts_per_tok exceeds"),
    (QWEN3_30B_A3B | {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, got 0"),
    (QWEN3_8B | {"head_dim": 12}, "head_dim must be a multiple of 8"),
]


@pytest.mark.parametrize(("fields", "problem"), REFUSED, ids=[problem for _, problem in REFUSED])
def test_what_the_other_families_refuse(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PolicyConfig.from_hf(fields)


def test_names_of_transformers_5() -> None:
    """It keeps the rotary fields together, calls the number of experts otherwise, and writes what is off as null."""
    moved = {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "num_local_experts": 128}
    fields = {k: v for k, v in QWEN3_30B_A3B.items() if k not in ("rope_theta", "rope_scaling", "num_experts")}
    written = fields | moved | {"pad_token_id": None, "layer_types": None}
    assert PolicyConfig.from_hf(written) == PolicyConfig.from_hf(QWEN3_30B_A3B)
    scaling = LLAMA_3_8B["rope_scaling"] | {"rope_theta": 500000.0}
    fields = {k: v for k, v in LLAMA_3_8B.items() if k not in ("rope_theta", "rope_scaling")}
    assert PolicyConfig.from_hf(fields | {"rope_parameters": scaling}) == PolicyConfig.from_hf(LLAMA_3_8B)


def test_what_llama_leaves_unsaid() -> None:
    config = PolicyConfig.from_hf(LLAMA_3_8B)
    assert config.head_dim == config.rotary_dim == 128
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert (config.stop_token_ids, config.pad_token_id) == ((128001, 128008, 128009), 128001)
    every_head = {k: v for k, v in LLAMA_3_8B.items() if k != "num_key_value_heads"}
    assert PolicyConfig.from_hf(every_head).num_key_value_heads == 32


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_softmax_attention_in_every_layer(name: str) -> None:
    config = family_config(name)
    assert all(config.is_softmax(layer) for layer in range(config.num_hidden_layers))


def test_layers_with_experts() -> None:
    """Every layer whose number, counted from 1, the step divides, but for those that are named."""
    config = dataclasses.replace(family_config("qwen3_moe"), num_hidden_layers=8)
    for step, named, layers in ((1, (), range(8)), (2, (), (1, 3, 5, 7)), (2, (3, 4), (1, 5, 7)), (3, (), (2, 5))):
        changed = dataclasses.replace(config, decoder_sparse_step=step, mlp_only_layers=named)
        assert [layer for layer in range(8) if changed.is_moe(layer)] == list(layers)


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
