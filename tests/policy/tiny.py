"""A small policy with every kind of layer and every parameter away from its neutral value, for the whole folder."""

from functools import cache

import torch

from policy.config import PolicyConfig
from policy.transformer import Policy

VOCAB = 50


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
