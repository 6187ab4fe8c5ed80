"""A vLLM engine inside this process, under this process's control of every step.

One process and no scheduling ahead: when `step` returns, its tokens are known and nothing is being computed, so weights
may change there and every token has one policy version. vLLM reads its environment when it is imported, so it is
imported here and nowhere earlier.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from policy.config import PolicyConfig
from policy.families import RING_LINEAR
from rollout.config import RolloutConfig
from rollout.vllm_plugin import make_modules_readable, register
from rollout.vllm_plugin.launch import aligned_arguments

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the runner that CPUs have too, so that one sampler serves both
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
NULL_BLOCK = 1  # vLLM keeps one block for padding
CPU_BLOCK_TOKENS = 128
INSTALL = "pip install '.[vllm]' on a machine with a GPU, .ci/vllm DIR for an environment on a CPU"


def open_vllm(
    config: PolicyConfig, folder: Path, dtype: torch.dtype, rollout: RolloutConfig, device: torch.device
) -> "LLMEngine":
    """An engine with arbitrary weights for the policy that folder/config.json describes.

    Raises ValueError when vLLM is not installed, cannot be imported, or has no class for the family.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"rollout.engine = vllm: vLLM cannot be imported ({error}). {INSTALL}") from None
    if rollout.speculative_tokens:
        raise ValueError(
            f"rollout.speculative_tokens = {rollout.speculative_tokens}: only the local engine drafts; set it to 0"
        )
    make_modules_readable()
    arguments = _arguments(folder, dtype, rollout, device)
    if rollout.vllm_aligned:
        register()
        arguments |= aligned_arguments(config, rollout)
    else:
        refuse_unserved(config)
        arguments |= _stock_arguments(config, dtype, rollout)
    return LLMEngine.from_engine_args(EngineArgs(**arguments))


def refuse_unserved(config: PolicyConfig) -> None:
    """Raises ValueError when vLLM has no class of its own for the family."""
    if config.model_type == RING_LINEAR:
        raise ValueError(
            f"rollout.engine = vllm: it has no class of its own for model_type {config.model_type}; set "
            "rollout.vllm_aligned=true, or rollout.engine=local"
        )


def max_sequence(config: PolicyConfig, dtype: torch.dtype, rollout: RolloutConfig) -> int:
    """Tokens of the longest sequence: what the policy allows and rollout.memory_mb holds."""
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    blocks = rollout.memory_mb * 2**20 // (token_bytes * CPU_BLOCK_TOKENS) - NULL_BLOCK
    if blocks < 1:
        least = -(-token_bytes * CPU_BLOCK_TOKENS * (1 + NULL_BLOCK) // 2**20)
        raise ValueError(
            f"rollout.memory_mb = {rollout.memory_mb}: keys and values of one sequence need at least {least} MiB; "
            "raise it"
        )
    return min(config.max_position_embeddings, blocks * CPU_BLOCK_TOKENS)


def _stock_arguments(config: PolicyConfig, dtype: torch.dtype, rollout: RolloutConfig) -> dict[str, Any]:
    longest = max_sequence(config, dtype, rollout)
    return {
        "max_model_len": longest,
        # A prompt is never split: a seeded request whose prefill takes several steps ends vLLM 0.32 on a CPU
        # ("CPU Generator does not use offset").
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(rollout.prefill_tokens, longest),
    }


def _arguments(folder: Path, dtype: torch.dtype, rollout: RolloutConfig, device: torch.device) -> dict[str, Any]:
    return {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": not any(folder.glob("tokenizer*")),
        "generation_config": "vllm",  # sampling is the request's, whatever the folder suggests
        "dtype": str(dtype).removeprefix("torch."),
        "kv_cache_memory_bytes": rollout.memory_mb * 2**20,
        "max_num_seqs": rollout.max_batch,
        "enable_prefix_caching": rollout.prefix_cache,
        "async_scheduling": False,
        "logprobs_mode": "processed_logprobs",
        # Compiling for a CPU takes a minute, and a graph that is replayed tells no routes.
        "enforce_eager": device.type == "cpu" or not rollout.decode_graphs or rollout.routing_replay != "none",
        "enable_sleep_mode": rollout.sleep_when_idle and device.type == "cuda",
        "seed": 0,
        "disable_log_stats": True,
    }
