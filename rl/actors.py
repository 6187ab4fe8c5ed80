"""What runs in processes of its own: engine, trainer and reward pool, wrapped as Ray actors. No logic lives here."""

import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ops
from policy.checkpoint import save_policy
from policy.config import PolicyConfig
from policy.lora import merged
from policy.names import export_tensors, load_tensors
from policy.transformer import Policy
from reward.composite import CompositeReward, Reward, RewardInput
from reward.config import RewardConfig
from reward.pool import RewardPool
from reward.result import RewardResult
from rl.config import Recipe
from rl.diagnose.witness import Witness, engine_tensors, engine_witness, trainer_witness
from rl.engines import open_rollout_engine
from rl.starting_policy import starting_policy
from rl.weight_sync import WeightPackage, pack_weights, unpack_weights
from rollout.config import RolloutConfig
from rollout.request import Completion, Request
from trainer.batch import TrainSample
from trainer.config import TrainerConfig
from trainer.correction_config import CorrectionConfig
from trainer.optimizer import warmup_cosine
from trainer.state import load_checkpoint, save_checkpoint
from trainer.trainer import StepResult, Trainer


def peak_memory_mb() -> float:
    """Most memory this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class EngineActor:
    """Its verbs may be called while `generate` runs."""

    def __init__(
        self,
        config: PolicyConfig,
        folder: Path,
        dtype: torch.dtype,
        rollout: RolloutConfig,
        threads: int,
        device: str,
        fast: Sequence[str],
    ) -> None:
        torch.set_num_threads(threads)
        ops.use_fast(fast)
        self.engine = open_rollout_engine(config, folder, dtype, rollout, torch.device(device))

    def describe(self) -> dict[str, object]:
        return {**self.engine.describe(), "pid": os.getpid(), "peak_memory_mb": peak_memory_mb()}

    def generate(self, requests: list[Request]) -> list[Completion]:
        return self.engine.generate(requests)

    def load_weights(self, package: WeightPackage) -> str:
        """Returns the digest of what the engine now runs on, computed from its own tensors."""
        self.engine.load_weights(unpack_weights(package), package.policy_version)
        return self.engine.weights_digest()

    def witness(self, traced: TrainSample, temperature: float) -> Witness:
        return engine_witness(self.engine, traced, temperature)

    def tensors(self, names: list[str]) -> WeightPackage:
        """Those of the engine's own weights, where `witness` gave their digests."""
        return engine_tensors(self.engine, names)


class TrainerActor:
    def __init__(self, threads: int, device: str, fast: Sequence[str]) -> None:
        torch.set_num_threads(threads)
        ops.use_fast(fast)
        torch.use_deterministic_algorithms(True)
        self.device = torch.device(device)
        self.trainer: Trainer
        self.kept_versions = 0
        self.versions: dict[int, dict[str, torch.Tensor]] = {}  # weights that an engine may still sample from

    def ready(self) -> int:
        return os.getpid()

    def peak_memory_mb(self) -> float:
        return peak_memory_mb()

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
        self.kept_versions = recipe.loop.max_staleness + 1 if recipe.loop.max_staleness else 0
        return policy.config

    def compute(self, samples: list[TrainSample]) -> StepResult:
        return self.trainer.compute(samples)

    def witness(self, samples: list[TrainSample], traced: TrainSample) -> Witness:
        return trainer_witness(self.trainer, samples, traced)

    def full_log_probs(self, samples: list[TrainSample]) -> list[np.ndarray]:
        return [self.trainer.full_log_probs(sample) for sample in samples]

    def apply(self) -> dict[str, float]:
        return self.trainer.apply()

    def set_correction(self, correction: CorrectionConfig) -> None:
        self.trainer.set_correction(correction)

    def weights(self) -> WeightPackage:
        tensors = export_tensors(merged(self.trainer.policy))
        if self.kept_versions:
            self.versions[self.trainer.policy_version] = {name: tensor.clone() for name, tensor in tensors.items()}
            for old in sorted(self.versions)[: -self.kept_versions]:
                del self.versions[old]
        return pack_weights(tensors, self.trainer.policy_version)

    def log_probs_of_versions(self, samples: list[TrainSample], versions: list[np.ndarray]) -> list[np.ndarray]:
        """Every token's log-prob under the weights it was sampled from: float32 [completion length] for each sample.

        versions: int64 [completion length] each. Raises ValueError for a version that is no longer kept. Routes are
        replayed under the version of the last token, which the engine computed them with; earlier ones have their own.
        """
        found = [np.full(len(each), np.nan, dtype=np.float32) for each in versions]
        for version in sorted({int(version) for each in versions for version in each}):
            chosen = [index for index, each in enumerate(versions) if (each == version).any()]
            replayed = [samples[i] if versions[i][-1] == version else samples[i].without_routes() for i in chosen]
            rescored = self._trainer_of(version).log_probs(replayed)
            for index, log_probs in zip(chosen, rescored, strict=True):
                found[index] = np.where(versions[index] == version, log_probs, found[index])
        return found

    def _trainer_of(self, version: int) -> Trainer:
        """With the weights of the newest version, or of an older one that is kept."""
        if version == self.trainer.policy_version:
            return self.trainer
        if version not in self.versions:
            raise ValueError(f"policy version {version} is gone, the trainer keeps {sorted(self.versions)}")
        policy = Policy(self.trainer.policy.config, self.trainer.policy.dtype).to(self.device)
        load_tensors(policy, self.versions[version])
        return Trainer(policy, self.trainer.config, self.trainer.temperature)

    def save_policy(self, folder: Path, source: Path | None, version: int | None = None) -> str:
        trainer = self.trainer if version is None else self._trainer_of(version)
        return save_policy(folder, merged(trainer.policy), source=source)

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
