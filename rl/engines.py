"""The engine that a recipe names, behind the verbs that all of them share."""

from pathlib import Path

import torch

from policy.config import PolicyConfig
from policy.transformer import Policy
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.verbs import RolloutEngine


def open_rollout_engine(
    config: PolicyConfig, folder: Path, dtype: torch.dtype, rollout: RolloutConfig, device: torch.device
) -> RolloutEngine:
    """An engine without weights: they come with `load_weights`. folder: a Hugging Face folder with the config.json of
    the policy, which vLLM and SGLang read. Raises ValueError when the engine is not installed."""
    if rollout.engine == "vllm":
        from rollout.vllm_engine.engine import VllmEngine

        return VllmEngine(config, folder, dtype, rollout, device)
    if rollout.engine == "sglang":
        from rollout.sglang_engine.engine import SglangEngine

        return SglangEngine(config, folder, dtype, rollout, device)
    return Engine(Policy(config, dtype).to_working_dtype(device), rollout)
