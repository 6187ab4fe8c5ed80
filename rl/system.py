"""The running system: Ray, one trainer, engine workers and a reward worker, under verbs of the loop's own language."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from rich.console import Console

from policy.config import PolicyConfig
from reward.composite import Reward, RewardInput
from reward.function_file import locate_function
from reward.result import RewardResult
from rl.actors import EngineActor, RewardActor, TrainerActor
from rl.config import Recipe
from rl.threads import THREAD_ENVIRONMENT
from rollout.request import Completion, Request
from trainer.batch import TrainSample
from trainer.trainer import StepResult

OBJECT_STORE_BYTES = 512 * 2**20
PATIENCE_SECONDS = 60.0


class System:
    """A context manager: leaving it stops what it started, and nothing else."""

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.recipe, self.console = recipe, console
        self.engines: list[Any] = []

    def __enter__(self) -> Self:
        _connect(self.recipe.ray.address)
        try:
            threads = self.recipe.trainer.threads or 1
            self.trainer = self._start_on_device(TrainerActor, threads, threads)
            self.reward = _start_actor(RewardActor, 1, 0.0, locate_function(self.recipe.reward))
            self.call("trainer and reward workers to start", self.trainer.ready.remote(), self.reward.ready.remote())
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.shutdown()

    def start_engines(self, config: PolicyConfig, dtype: torch.dtype) -> None:
        threads = self.recipe.rollout.threads or 1
        self.engines = [
            self._start_on_device(EngineActor, threads, config, dtype, self.recipe.rollout, threads)
            for _ in range(self.recipe.rollout.workers)
        ]
        self.call("engine workers to start", *(engine.ready.remote() for engine in self.engines))

    def _start_on_device(self, kind: type, threads: int, *arguments: Any) -> Any:
        """Trainer and engines share the cluster's GPUs evenly, one each where there are enough."""
        device, share = self.recipe.policy.device, 0.0
        if device == "cuda":
            share = min(1.0, ray.cluster_resources().get("GPU", 0.0) / (1 + self.recipe.rollout.workers))
        return _start_actor(kind, threads, share, *arguments, device, self.recipe.ops.fast)

    def sync_weights(self) -> str:
        """Moves the trainer's weights into every engine; returns their digest, proven equal on both sides."""
        reference = self.trainer.weights.remote()
        found = self.call("weights", *(engine.load_weights.remote(reference) for engine in self.engines))
        expected = self.call("weights", reference)[0].digest
        if set(found) != {expected}:
            raise ValueError(f"engines hold weights {found}, the trainer {expected}: weight sync is broken")
        return str(expected)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Shares the requests out to the engines; completions in order of request, then of sample."""
        shares = [list(requests[worker :: len(self.engines)]) for worker in range(len(self.engines))]
        pending = [engine.generate.remote(share) for engine, share in zip(self.engines, shares, strict=True) if share]
        place = {request.request_id: index for index, request in enumerate(requests)}
        completions = [completion for share in self.call("rollouts", *pending) for completion in share]
        return sorted(completions, key=lambda completion: (place[completion.request_id], completion.sample))

    def score(self, items: list[tuple[str, str]]) -> list[RewardResult]:
        """The verdicts on (completion, gold answer) pairs, which is what an evaluation counts."""
        results: list[RewardResult] = self.call("verdicts", self.reward.score.remote(items))[0]
        return results

    def rewards(self, inputs: list[RewardInput]) -> list[Reward]:
        """What each completion earned by the recipe's components, which is what training learns from."""
        results: list[Reward] = self.call("rewards", self.reward.rewards.remote(inputs))[0]
        return results

    def start_training(self, folder: Path) -> PolicyConfig:
        config: PolicyConfig = self.call("the base policy to load", self.trainer.start.remote(folder, self.recipe))[0]
        return config

    def compute(self, samples: list[TrainSample]) -> StepResult:
        result: StepResult = self.call("gradients", self.trainer.compute.remote(samples))[0]
        return result

    def full_log_probs(self, samples: list[TrainSample]) -> list[np.ndarray]:
        rows: list[np.ndarray] = self.call("full-vocabulary log-probs", self.trainer.full_log_probs.remote(samples))[0]
        return rows

    def apply(self) -> dict[str, float]:
        metrics: dict[str, float] = self.call("the optimizer step", self.trainer.apply.remote())[0]
        return metrics

    def save_checkpoint(self, path: Path, extra: dict[str, Any]) -> None:
        self.call("the checkpoint", self.trainer.save_checkpoint.remote(path, extra))

    def load_checkpoint(self, path: Path) -> dict[str, Any]:
        """Returns the `extra` it was saved with."""
        extra: dict[str, Any] = self.call("the checkpoint", self.trainer.load_checkpoint.remote(path))[0]
        return extra

    def save_policy(self, folder: Path, source: Path | None = None) -> None:
        """source: where the tokenizer and what else goes along with the weights is copied from, if it shall."""
        self.call("the policy to be saved", self.trainer.save_policy.remote(folder, source))

    def call(self, what: str, *references: Any) -> list[Any]:
        """Waits for results, saying what for when it takes long. An actor's own error is raised as it was there."""
        pending, start = list(references), time.monotonic()
        while pending:
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=PATIENCE_SECONDS)
            if pending:
                self.console.print(f"still waiting for {what} after {time.monotonic() - start:.0f} s")
        try:
            return [ray.get(reference) for reference in references]
        except RayActorError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"a worker died while the run waited for {what}: {reason}. Continue with --resume"
            ) from error
        except RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, Exception) else error from None


def _start_actor(kind: type, threads: int, gpus: float, *arguments: Any) -> Any:
    """`kind(*arguments)` in a process of its own, with a share of a GPU.

    Thread counts have to be in place before torch is imported there.
    """
    environment = {**THREAD_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    actor: Any = ray.remote(kind)
    resources = {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
    return actor.options(**resources, runtime_env={"env_vars": environment}).remote(*arguments)


def _connect(address: str | None) -> None:
    """Joins the cluster of the recipe or RAY_ADDRESS, or starts Ray on this machine, on loopback and no dashboard."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 any other process starves a team of threads
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, _node_ip_address="127.0.0.1", **quiet
            )
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise ValueError(
            f"cannot start or reach {where}: {error}. Check ray.address and RAY_ADDRESS (and RAY_AUTH_TOKEN, where the "
            "cluster asks for a token), or unset them"
        ) from None
