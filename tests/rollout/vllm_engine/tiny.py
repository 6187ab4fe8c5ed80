"""Small policies in a real vLLM, and the trainer's word on what it should have said."""

import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from policy.checkpoint import dtype_name, save_config
from policy.config import PolicyConfig
from policy.names import export_tensors
from policy.transformer import Policy
from rollout.config import RolloutConfig
from rollout.request import Completion, Request, SamplingParams
from rollout.vllm_engine.engine import VllmEngine
from tests.policy.test_vllm import ENDS, SIZES
from tests.policy.tiny import FIELDS, make_config, make_policy
from trainer.batch import TrainSample
from trainer.config import TrainerConfig
from trainer.trainer import Trainer

POSITIONS = 512
_OPENED: list[VllmEngine] = []
LONG = 200  # tokens of a prompt that fills a block of vLLM's cache, which has 128 on a CPU


def config_of(family: str) -> PolicyConfig:
    sizes = SIZES | {"max_position_embeddings": POSITIONS}
    if family == "ring_linear":
        return replace(make_config(), **(sizes | {"eos_token_id": tuple(ENDS)}))
    fields = {field: sizes.get(field, value) for field, value in FIELDS[family].items()}
    return PolicyConfig.from_hf(fields | {"lockstep": {"chunk_size": 16}})


@cache
def policy_of(family: str, version: int = 0, dtype: torch.dtype = torch.float32) -> Policy:
    """Other weights for every version, of the same size, and those of the norms alike."""
    policy = make_policy(config_of(family), dtype)
    norms = {name: tensor.clone() for name, tensor in policy.state_dict().items() if tensor.ndim == 1}
    policy.initialize(version)
    policy.load_state_dict(norms, strict=False)
    return policy


def weights(family: str, version: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return export_tensors(policy_of(family, version, dtype))


def reset_groups() -> None:
    """vLLM has one set of process groups: made for the family of the first engine, and gone with the first that goes.
    So each engine here makes them anew, and none goes."""
    if "vllm" in sys.modules:
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        destroy_model_parallel()
        destroy_distributed_environment()


def open_engine(family: str, dtype: torch.dtype = torch.float32, **rollout: object) -> VllmEngine:
    """Without weights."""
    reset_groups()
    settings = RolloutConfig.model_validate({"engine": "vllm", "max_batch": 16, "memory_mb": 32, **rollout})
    folder = Path(tempfile.mkdtemp())
    save_config(folder, config_of(family), dtype_name(dtype), None)
    _OPENED.append(VllmEngine(config_of(family), folder, dtype, settings, torch.device("cpu")))
    return _OPENED[-1]


def prompt(length: int, seed: int = 0) -> np.ndarray:
    """Without the tokens that end a text."""
    return np.random.default_rng(seed).integers(12, SIZES["vocab_size"], length)


def request(index: int, length: int, samples: int = 1, **sampling: object) -> Request:
    """Keeps the whole vocabulary of every sample."""
    wanted = SamplingParams(**{"max_new_tokens": 24, **sampling})  # type: ignore[arg-type]
    return Request(index, prompt(length, index), samples, wanted, 7, 1, index, tuple(range(samples)))


def trainer_rows(policy: Policy, asked: Request, completion: Completion) -> np.ndarray:
    """Log-probs over the vocabulary of a whole forward: float32 [completion length, V]."""
    ids = np.concatenate([asked.prompt_ids, completion.token_ids])
    sample = TrainSample(ids, len(asked.prompt_ids), completion.log_probs, 0.0)
    return Trainer(policy, TrainerConfig(), asked.sampling.temperature or 1.0).full_log_probs(sample)


def difference(policy: Policy, asked: Request, completion: Completion) -> np.ndarray:
    """Engine against trainer: the largest of the vocabulary, [completion length]."""
    assert completion.full_log_probs is not None
    found: np.ndarray = np.abs(trainer_rows(policy, asked, completion) - completion.full_log_probs).max(1)
    return found
