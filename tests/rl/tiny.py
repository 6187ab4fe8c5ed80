"""A recipe small enough for seconds, and the running system without Ray: the same actors as plain objects."""

import errno
import itertools
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import numpy as np
import torch

import ops
from policy.transformer import Policy
from reward.composite import Reward
from reward.result import Reason, RewardResult
from rl.actors import RewardActor, TrainerActor
from rl.config import Recipe, load_recipe
from rl.data_columns import Row
from rl.prompts import Prompt
from rl.rollouts import Scored
from rl.system import System
from rollout.request import Completion

# Remainders are small, so a policy that has only learnt the form is sometimes right: without a reward now and then
# no weight would change, and equal weights would prove nothing.
RECIPE = """
name: tiny
seed: 0
policy:
  device: cpu
  dtype: float32
  config:
    model_type: bailing_moe_linear
    hidden_size: 32
    num_hidden_layers: 2
    layer_group_size: 2
    num_attention_heads: 4
    num_key_value_heads: 2
    head_dim: 16
    intermediate_size: 64
    moe_intermediate_size: 16
    moe_shared_expert_intermediate_size: 16
    num_experts: 4
    num_experts_per_tok: 2
    max_position_embeddings: 256
    initializer_range: 0.05
  vocab_size: 300
warm_start: {steps: 60, tokens_per_step: 1024, learning_rate: 1.0e-2, slip_rate: 0.5}
data: {train_size: 40, eval_size: 8, families: [remainder]}
rollout: {max_new_tokens: 40, max_batch: 32, memory_mb: 32, threads: 1}
trainer: {threads: 1, token_budget: 512, learning_rate: 1.0e-3}
evaluation: {samples: 2, every: 2, max_new_tokens: 40}
loop: {steps: 4, prompts_per_step: 4, group_size: 4, checkpoint_every: 1}
"""
STEPS, PROMPTS, GROUP = 4, 4, 4


def write_recipe(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def tiny_recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write_recipe(folder), overrides)


def full_disk_at(writer: str, call: int) -> Callable[..., Any]:
    """The function of this dotted name, for which the disk is full when it is called for the `call`-th time."""
    original, calls = pkgutil.resolve_name(writer), itertools.count(1)

    def write(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    return write


class LocalActor:
    """A call runs at once, and its reference is its result."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __getattr__(self, verb: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.target, verb))


class LocalSystem(System):
    """Every actor in this process."""

    def __enter__(self) -> Self:
        self.trainer = self._start_on_device(TrainerActor, 1, 1)
        self.reward = LocalActor(RewardActor(self.recipe.reward))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reward.target.pool.close()
        torch.use_deterministic_algorithms(False)
        ops.use_fast([])

    def _start_on_device(self, kind: type, threads: int, *arguments: Any) -> LocalActor:
        return LocalActor(kind(*arguments, "cpu", self.recipe.ops.fast))

    def outcomes(self, what: str, *references: Any) -> list[Any]:
        return list(references)

    @property
    def trained(self) -> Policy:
        policy: Policy = self.trainer.target.trainer.policy
        return policy

    @property
    def sampled(self) -> Policy:
        policy: Policy = self.engines[0].target.engine.policy
        return policy


def make_prompt(index: int, answer: str = "7", family: str = "remainder", ids: tuple[int, ...] = (5, 6)) -> Prompt:
    row = Row(f"row-{index}", f"Problem {index}?", answer, f"synthetic/{family}")
    return Prompt(row, index, f"Problem {index}?\n", np.array(ids, dtype=np.int64))


def make_completion(request_id: int, sample: int, ids: tuple[int, ...], finish_reason: str = "stop") -> Completion:
    """Log-probs -0.5, -1.0, -1.5, ... and policy version 3."""
    log_probs = -0.5 * np.arange(1, len(ids) + 1, dtype=np.float32)
    versions = np.full(len(ids), 3, dtype=np.int64)
    return Completion(request_id, sample, np.array(ids, dtype=np.int64), log_probs, versions, finish_reason)


def make_scored(
    prompt: Prompt, sample: int, ids: tuple[int, ...], reason: Reason, advantage: float, finish_reason: str = "stop"
) -> Scored:
    completion = make_completion(prompt.index, sample, ids, finish_reason)
    return Scored(prompt, completion, "so \\boxed{7}", make_reward(reason), advantage)


def make_reward(reason: Reason, message: str = "") -> Reward:
    """The reward of a recipe that names no component."""
    verdict = RewardResult.of(reason, None if reason is Reason.NO_ANSWER else "7", 0.5)
    value = None if verdict.is_failure else verdict.score
    return Reward(value, {"correctness": value}, verdict, reason, message)
