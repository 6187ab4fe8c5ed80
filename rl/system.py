"""The running system: Ray, one trainer, engine workers and a reward worker, under verbs of the loop's own language."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from rl.actors import EngineActor, RewardActor, TrainerActor, peak_memory_mb
from rl.config import Recipe
from rl.diagnose.witness import Witness
from rl.threads import THREAD_ENVIRONMENT
from rl.weight_sync import WeightPackage, unpack_weights
from rollout.request import Completion, Request
from rollout.verbs import EngineDied
from trainer.batch import TrainSample
from trainer.correction_config import CorrectionConfig
from trainer.trainer import StepResult

OBJECT_STORE_BYTES = 512 * 2**20
PATIENCE_SECONDS = 60.0
CALLS_AT_ONCE = 4  # an engine takes weights while it generates
REMEMBERED_VERSIONS = 4
MAX_REPLACEMENTS = 3  # of one engine in a row, before the run gives up


@dataclass(frozen=True)
class LostWorker:
    """In place of a result: the process that should have made it has died."""

    reason: str


class System:
    """A context manager: leaving it stops what it started, and nothing else.

    on_restart: told of every engine that died and was replaced.
    """

    def __init__(self, recipe: Recipe, console: Console, on_restart: Callable[[str], None] | None = None) -> None:
        self.recipe, self.console = recipe, console
        self.on_restart = on_restart or (lambda text: None)
        self.engines: list[Any] = []
        self._weights: Any = None  # reference to the newest package
        self._generating = threading.Lock()
        self.sent_digests: dict[int, dict[str, str]] = {}  # by policy version, of the newest

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

    def start_engines(self, config: PolicyConfig, folder: Path, dtype: torch.dtype) -> None:
        """folder: the config.json of the policy, as `open_rollout_engine` wants it."""
        self._engine_settings = (config, folder, dtype)
        self.engines = [self._start_engine() for _ in range(self.recipe.rollout.workers)]
        self.call("engine workers to start", *(engine.describe.remote() for engine in self.engines))

    def _start_engine(self) -> Any:
        threads = self.recipe.rollout.threads or 1
        return self._start_on_device(EngineActor, threads, *self._engine_settings, self.recipe.rollout, threads)

    def _start_on_device(self, kind: type, threads: int, *arguments: Any) -> Any:
        """Trainer and engines share the cluster's GPUs evenly, one each where there are enough."""
        device, share = self.recipe.policy.device, 0.0
        if device == "cuda":
            share = min(1.0, ray.cluster_resources().get("GPU", 0.0) / (1 + self.recipe.rollout.workers))
        return _start_actor(kind, threads, share, *arguments, device, self.recipe.ops.fast)

    def sync_weights(self) -> str:
        """Moves the trainer's weights into every engine; returns their digest, proven equal on both sides."""
        self._weights = self.trainer.weights.remote()
        found = self.call("weights", *(engine.load_weights.remote(self._weights) for engine in self.engines))
        package: WeightPackage = self.call("weights", self._weights)[0]
        self._remember_digests(package)
        expected = package.digest
        if set(found) != {expected}:
            raise ValueError(f"engines hold weights {found}, the trainer {expected}: weight sync is broken")
        return str(expected)

    def _remember_digests(self, package: WeightPackage) -> None:
        """What each tensor of the newest versions was, by which a stale one is known."""
        self.sent_digests[package.policy_version] = {name: each.digest for name, each in package.tensors.items()}
        for old in sorted(self.sent_digests)[:-REMEMBERED_VERSIONS]:
            del self.sent_digests[old]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Shares the requests out to the engines; completions in order of request, then of sample.

        An engine that dies is replaced and asked again. As draws are addressed, the local engine then gives the bits it
        would have given. One call at a time: another thread's waits.
        """
        shares = {worker: list(requests[worker :: len(self.engines)]) for worker in range(len(self.engines))}
        shares = {worker: share for worker, share in shares.items() if share}
        completions: list[Completion] = []
        with self._generating:
            for attempt in range(MAX_REPLACEMENTS + 1):
                pending = [self.engines[worker].generate.remote(share) for worker, share in shares.items()]
                answers = dict(zip(shares, self.outcomes("rollouts", *pending), strict=True))
                lost = {worker: answer for worker, answer in answers.items() if isinstance(answer, LostWorker)}
                completions += [each for worker, done in answers.items() if worker not in lost for each in done]
                if not lost:
                    break
                if attempt == MAX_REPLACEMENTS:
                    raise ValueError(_lost_message("rollouts", *lost.values()))
                for worker, answer in lost.items():
                    self._replace(worker, answer)
                shares = {worker: shares[worker] for worker in lost}
        place = {request.request_id: index for index, request in enumerate(requests)}
        return sorted(completions, key=lambda completion: (place[completion.request_id], completion.sample))

    def _replace(self, worker: int, lost: LostWorker) -> None:
        """A new engine with the newest weights in place of a dead one."""
        self.on_restart(f"engine {worker} died and was replaced; its requests are asked again ({lost.reason})")
        self.engines[worker] = self._start_engine()
        self.call("a new engine worker", self.engines[worker].load_weights.remote(self._weights))

    def peak_memory(self) -> dict[str, float]:
        """Most memory that each kind of process has held so far, MiB; of the engines the largest."""
        trainer, *engines = self.call(
            "memory", self.trainer.peak_memory_mb.remote(), *(engine.describe.remote() for engine in self.engines)
        )
        engine = max(float(each["peak_memory_mb"]) for each in engines)
        return {"memory/driver_mb": peak_memory_mb(), "memory/trainer_mb": trainer, "memory/engine_mb": engine}

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

    def log_probs_of_versions(self, samples: list[TrainSample], versions: list[np.ndarray]) -> list[np.ndarray]:
        """Of every token under the weights it was sampled from, as `TrainerActor.log_probs_of_versions`."""
        reference = self.trainer.log_probs_of_versions.remote(samples, versions)
        rows: list[np.ndarray] = self.call("log-probs of older versions", reference)[0]
        return rows

    def full_log_probs(self, samples: list[TrainSample]) -> list[np.ndarray]:
        rows: list[np.ndarray] = self.call("full-vocabulary log-probs", self.trainer.full_log_probs.remote(samples))[0]
        return rows

    def witnesses(self, samples: list[TrainSample], traced: TrainSample) -> tuple[Witness, list[Witness]]:
        """What the trainer and every engine say of themselves, with a trace of one sequence in each."""
        temperature = self.recipe.rollout.temperature
        trainer, *engines = self.call(
            "what trainer and engines say of themselves",
            self.trainer.witness.remote(samples, traced),
            *(engine.witness.remote(traced, temperature) for engine in self.engines),
        )
        return trainer, engines

    def engine_tensors(self, worker: int, names: list[str]) -> dict[str, torch.Tensor]:
        """Those that the engine computes with, by the family's names."""
        package = self.call("an engine's weights", self.engines[worker].tensors.remote(names))[0]
        return unpack_weights(package)

    def apply(self) -> dict[str, float]:
        metrics: dict[str, float] = self.call("the optimizer step", self.trainer.apply.remote())[0]
        return metrics

    def set_correction(self, correction: CorrectionConfig) -> None:
        """From the next step on."""
        self.call("the correction", self.trainer.set_correction.remote(correction))

    def save_checkpoint(self, path: Path, extra: dict[str, Any]) -> None:
        self.call("the checkpoint", self.trainer.save_checkpoint.remote(path, extra))

    def load_checkpoint(self, path: Path) -> dict[str, Any]:
        """Returns the `extra` it was saved with."""
        extra: dict[str, Any] = self.call("the checkpoint", self.trainer.load_checkpoint.remote(path))[0]
        return extra

    def save_policy(self, folder: Path, source: Path | None = None, version: int | None = None) -> None:
        """source: where the tokenizer and what else goes along with the weights is copied from, if it shall.
        version: of the weights, by default the newest."""
        self.call("the policy to be saved", self.trainer.save_policy.remote(folder, source, version))

    def call(self, what: str, *references: Any) -> list[Any]:
        """Waits for results. Raises ValueError when a worker died, and what an actor raised as it was there."""
        results = self.outcomes(what, *references)
        if lost := [result for result in results if isinstance(result, LostWorker)]:
            raise ValueError(_lost_message(what, *lost))
        return results

    def outcomes(self, what: str, *references: Any) -> list[Any]:
        """Waits for results, saying what for when it takes long; `LostWorker` in place of those of dead workers."""
        pending, start = list(references), time.monotonic()
        while pending:
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=PATIENCE_SECONDS)
            if pending:
                self.console.print(f"still waiting for {what} after {time.monotonic() - start:.0f} s")
        return [_outcome(reference) for reference in references]


def _outcome(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayActorError as error:
        return LostWorker(str(error).splitlines()[0])
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, EngineDied):
            return LostWorker(str(cause))
        raise cause if isinstance(cause, Exception) else error from None


def _lost_message(what: str, *lost: LostWorker) -> str:
    return f"a worker died while the run waited for {what}: {lost[0].reason}. Continue with --resume"


def _start_actor(kind: type, threads: int, gpus: float, *arguments: Any) -> Any:
    """`kind(*arguments)` in a process of its own, with a share of a GPU.

    Thread counts have to be in place before torch is imported there.
    """
    environment = {**THREAD_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    actor: Any = ray.remote(kind)
    resources = {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
    if kind is EngineActor:
        resources["max_concurrency"] = CALLS_AT_ONCE
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
