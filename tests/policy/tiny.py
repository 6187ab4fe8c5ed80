"""A small policy with every kind of layer and every parameter away from its neutral value, for the whole folder, and
small policies of the other families."""

from functools import cache
from typing import Any

import torch

from policy.config import PolicyConfig
from policy.transformer import Policy

VOCAB = 50
_DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "eos_token_id": 49,
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3}
# The fields stand for the original 32 positions, so that all three branches of the scaling occur.
_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# config.json of the families that transformers has classes for, by what is special about them.
FIELDS: dict[str, dict[str, Any]] = {
    "qwen3": _DENSE | {"model_type": "qwen3"},
    "qwen3_tied": _DENSE | {"model_type": "qwen3", "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "qwen3_moe": _DENSE | _EXPERTS | {"model_type": "qwen3_moe", "norm_topk_prob": True},
    "qwen3_moe_mixed": _DENSE
    | _EXPERTS
    | {"model_type": "qwen3_moe", "norm_topk_prob": False, "num_hidden_layers": 4, "mlp_only_layers": [1]}
    | {"decoder_sparse_step": 2},
    "llama": _DENSE | {"model_type": "llama", "rope_theta": 500000.0},
    "llama_scaled": _DENSE | {"model_type": "llama", "tie_word_embeddings": True, "rope_scaling": _SCALING},
    "llama_all_heads": {
        name: value for name, value in _DENSE.items() if name not in ("head_dim", "num_key_value_heads")
    }
    | {"model_type": "llama", "eos_token_id": [49, 48]},
}


def make_config(chunk_size: int = 16, decay_layer_index: str = "engine") -> PolicyConfig:
    """Layers: lightning, softmax, lightning, softmax, and a tail that is softmax; all but the first have experts."""
    return PolicyConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=5,
        layer_group_size=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        group_norm_size=2,
        intermediate_size=48,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        max_position_embeddings=96,
        initializer_range=0.3,
        eos_token_id=49,
        pad_token_id=48,
        chunk_size=chunk_size,
        decay_layer_index=decay_layer_index,
    )


def family_config(name: str) -> PolicyConfig:
    return PolicyConfig.from_hf(FIELDS[name] | {"lockstep": {"chunk_size": 16}})


def make_policy(config: PolicyConfig, dtype: torch.dtype) -> Policy:
    policy = Policy(config, dtype)
    policy.initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.3, generator=generator)
        for name, buffer in policy.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(0.0, 0.1, generator=generator)
    return policy


@cache
def shared_policy(dtype: torch.dtype, chunk_size: int = 16) -> Policy:
    """One for all tests that only read it."""
    return make_policy(make_config(chunk_size), dtype)
