"""What `VllmEngine` asks of vLLM when our classes serve."""

from typing import Any

from policy.config import PolicyConfig
from rollout.config import RolloutConfig
from rollout.vllm_plugin import ALIGNED_CLASS, HYBRID_CLASS


def aligned_arguments(config: PolicyConfig, rollout: RolloutConfig) -> dict[str, Any]:
    """In place of those for vLLM's own classes."""
    softmax_only = all(config.is_softmax(layer) for layer in range(config.num_hidden_layers))
    return {
        "hf_overrides": {"architectures": [ALIGNED_CLASS if softmax_only else HYBRID_CLASS]},
        "max_model_len": -1,  # as much of what the policy allows as fits into the memory
        "block_size": config.chunk_size,  # vLLM takes a multiple where states need more room
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": max(rollout.prefill_tokens, rollout.max_batch),
        "enforce_eager": True,  # a step is laid out on the host
    }
