"""Small policies in a real vLLM, and the trainer's word on what it should have said."""

import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ops
from policy.checkpoint import dtype_name, save_config
from policy.config import PolicyConfig
from policy.names import export_tensors
from policy.routing import Routing
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
    So each engine here makes them anew, and none goes. It has one table of positions too, for all models of a shape,
    which an update that fails midway leaves without its numbers."""
    if "vllm" in sys.modules:
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
        from vllm.model_executor.layers import rotary_embedding

        rotary_embedding._ROPE_DICT.clear()
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


def replaying(asked: Request, completion: Completion, replay: str) -> TrainSample:
    """What the trainer gets under a rollout.routing_replay."""
    experts = None if replay == "none" else completion.routed_experts
    weights = completion.routed_weights if replay == "weights" else None
    ids = np.concatenate([asked.prompt_ids, completion.token_ids])
    return TrainSample(ids, len(asked.prompt_ids), completion.log_probs, 0.0, experts, weights)


def own_routes(policy: Policy, asked: Request, completion: Completion) -> tuple[np.ndarray, np.ndarray]:
    """What the trainer's router says of all tokens but the last: experts ascending, and their weights."""
    ids = torch.from_numpy(np.concatenate([asked.prompt_ids, completion.token_ids]))
    routing = Routing()
    with torch.no_grad():
        policy(ids, ops.ChunkLayout.build([len(ids)], policy.config.chunk_size), routing=routing)
    return routing.chosen()[:-1].numpy(), routing.weights()[:-1].numpy()


def ordered_routes(completion: Completion) -> tuple[np.ndarray, np.ndarray]:
    """What the engine recorded, experts ascending."""
    assert completion.routed_experts is not None and completion.routed_weights is not None
    order = completion.routed_experts.argsort(-1)
    return tuple(np.take_along_axis(x, order, -1) for x in (completion.routed_experts, completion.routed_weights))


def mean_difference(policy: Policy, asked: list[Request], completions: list[Completion], replay: str) -> float:
    """|trainer - engine| of the sampled tokens' log-probs at temperature 1. Request i has the id i."""
    samples = [replaying(asked[each.request_id], each, replay) for each in completions]
    found = Trainer(policy, TrainerConfig(), 1.0).log_probs(samples)
    return float(np.abs(np.concatenate(found) - np.concatenate([each.log_probs for each in completions])).mean())


def experts_used(policy: Policy, sample: TrainSample) -> np.ndarray:
    """By the trainer's forward over all tokens but the last, seen where experts are called: [tokens - 1, layers, k]."""
    used, whole = [], ops.experts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "experts", lambda *call: (used.append(call[3].clone()), whole(*call))[1])
        Trainer(policy, TrainerConfig(), 1.0).log_probs([sample])
    return torch.stack(used, dim=1)[:-1].numpy()


def watch(patch: pytest.MonkeyPatch, owner: type, name: str) -> list[Any]:
    """What it returns, call by call."""
    results, whole = [], getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        results.append(whole(*arguments, **named))
        return results[-1]

    patch.setattr(owner, name, call)
    return results
