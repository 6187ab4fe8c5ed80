"""What runs in processes of its own: engine, trainer and reward pool, wrapped as Ray actors. No logic lives here."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ops
from policy.checkpoint import save_policy
from policy.config import PolicyConfig
from policy.lora import merged
from policy.names import export_tensors
from policy.transformer import Policy
from reward.composite import CompositeReward, Reward, RewardInput
from reward.config import RewardConfig
from reward.pool import RewardPool
from reward.result import RewardResult
from rl.config import Recipe
from rl.starting_policy import starting_policy
from rl.weight_sync import WeightPackage, pack_weights, policy_digest, unpack_weights
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Completion, Request
from trainer.batch import TrainSample
from trainer.config import TrainerConfig
from trainer.optimizer import warmup_cosine
from trainer.state import load_checkpoint, save_checkpoint
from trainer.trainer import StepResult, Trainer


class EngineActor:
    def __init__(
        self,
        config: PolicyConfig,
        dtype: torch.dtype,
        rollout: RolloutConfig,
        threads: int,
        device: str,
        fast: Sequence[str],
    ) -> None:
        torch.set_num_threads(threads)
        ops.use_fast(fast)
        self.engine = Engine(Policy(config, dtype).to_working_dtype(torch.device(device)), rollout)

    def ready(self) -> dict[str, object]:
        return {**self.engine.describe(), "pid": os.getpid()}

    def generate(self, requests: list[Request]) -> list[Completion]:
        return self.engine.generate(requests)

    def load_weights(self, package: WeightPackage) -> str:
        """Returns the digest of what the engine now runs on, computed from its own tensors."""
        self.engine.load_weights(unpack_weights(package), package.policy_version)
        return policy_digest(self.engine.policy)


class TrainerActor:
    def __init__(self, threads: int, device: str, fast: Sequence[str]) -> None:
        torch.set_num_threads(threads)
        ops.use_fast(fast)
        torch.use_deterministic_algorithms(True)
        self.device = torch.device(device)
        self.trainer: Trainer

    def ready(self) -> int:
        return os.getpid()

    def start_supervised(
        self, config: PolicyConfig, dtype: torch.dtype, seed: int, trainer: TrainerConfig, total_steps: int
    ) -> int:
        """A freshly initialised policy, to be taught by `supervised_step`; returns its parameter count."""
        policy = Policy(config, dtype)
        policy.initialize(seed)
        schedule = warmup_cosine(trainer.learning_rate, trainer.warmup_steps, total_steps)
        self.trainer = Trainer(policy.to(self.device), trainer, temperature=1.0, schedule=schedule)
        return policy.num_parameters()

    def supervised_step(self, demonstrations: list[tuple[np.ndarray, int]]) -> dict[str, float]:
        return self.trainer.supervised_step(demonstrations)

    def start(self, folder: Path, recipe: Recipe) -> PolicyConfig:
        """The policy in a Hugging Face folder, to be trained by `compute` and `apply`."""
        policy = starting_policy(folder, recipe).to(self.device)
        self.trainer = Trainer(policy, recipe.trainer, recipe.rollout.temperature)
        return policy.config

    def compute(self, samples: list[TrainSample]) -> StepResult:
        return self.trainer.compute(samples)

    def full_log_probs(self, samples: list[TrainSample]) -> list[np.ndarray]:
        return [self.trainer.full_log_probs(sample) for sample in samples]

    def apply(self) -> dict[str, float]:
        return self.trainer.apply()

    def weights(self) -> WeightPackage:
        return pack_weights(export_tensors(merged(self.trainer.policy)), self.trainer.policy_version)

    def save_policy(self, folder: Path, source: Path | None) -> str:
        return save_policy(folder, merged(self.trainer.policy), source=source)

    def save_checkpoint(self, path: Path, extra: dict[str, Any]) -> None:
        save_checkpoint(path, self.trainer, extra)

    def load_checkpoint(self, path: Path) -> dict[str, Any]:
        return load_checkpoint(path, self.trainer)


class RewardActor:
    def __init__(self, config: RewardConfig) -> None:
        self.pool = RewardPool(config)
        self.composite = CompositeReward(config, self.pool)

    def ready(self) -> int:
        return os.getpid()

    def score(self, items: list[tuple[str, str]]) -> list[RewardResult]:
        return self.pool.score(items)

    def rewards(self, inputs: list[RewardInput]) -> list[Reward]:
        return self.composite.score(inputs)
