"""`lockstep bench alignment`: what agreement in every bit costs on this machine, for one policy.

Each operator that has a fast form, and a whole step (sampling, and a training step), aligned and fast. The forms take
turns within a round, so that a slow minute of the machine falls on all of them, and ratios are taken within rounds.
"""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

import ops
from policy.checkpoint import dtype_name
from policy.config import PolicyConfig
from policy.transformer import Policy
from rl.alignment_cost import Cost
from rl.bench_operators import Shapes, operator_calls
from rl.bench_policy import Subject
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Request, SamplingParams
from trainer.batch import TrainSample
from trainer.config import TrainerConfig
from trainer.trainer import Trainer

ALL = "all of them"
DECODE_ONLY = ("lightning_attention",)  # operators whose form in training is the only one
NEVER = -1  # end-of-text id that no token has, so that every completion has its full length
MIN_TIMING_SECONDS = 0.02  # a shorter call is repeated within one timing


@dataclass(frozen=True)
class Load:
    """sequences: sampled at once, and trained on. rounds: timings of each form, after one that does not count."""

    sequences: int = 64
    prompt: int = 32
    new_tokens: int = 64
    rounds: int = 7


def measure(subject: Subject, load: Load, say: Callable[[str], None]) -> dict[str, Any]:
    """The result, as `rl.alignment_cost` shows it. say: told what is measured next."""
    costs: list[Cost] = []
    with _as_in_a_run(subject.threads):
        shapes = Shapes(load.sequences, load.prompt + load.new_tokens)
        for call in operator_calls(subject.config, subject.dtype, subject.device, shapes):
            say(f"{call.operator}: {call.what}")
            run = _repeated(call.run, subject.device)
            costs += _costs(call.what, run, [call.operator], load.rounds, subject.device)
        used = _used(subject.config)
        for what, stage in (("sampling", _sampling), ("training step", _training)):
            say(what)
            forms = [name for name in used if stage is _sampling or name not in DECODE_ONLY]
            costs += _costs(what, stage(subject, load), [*forms, ALL], load.rounds, subject.device)
    return {
        "policy": subject.name,
        "parameters": subject.parameters,
        "dtype": dtype_name(subject.dtype),
        "device": _device_name(subject.device),
        "threads": subject.threads,
        "torch": torch.__version__,
        "load": asdict(load),
        "costs": [asdict(cost) for cost in costs],
    }


@contextmanager
def _as_in_a_run(threads: int) -> Iterator[None]:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        ops.use_fast([])
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def _used(config: PolicyConfig) -> list[str]:
    """Operators with a fast form that the policy computes with."""
    softmax = {config.is_softmax(layer) for layer in range(config.num_hidden_layers)}
    absent = (
        {"softmax_attention"} if True not in softmax else {"lightning_attention"} if False not in softmax else set()
    )
    return [name for name in ops.FAST_FORMS if name not in absent]


def _costs(what: str, run: Callable[[], float], forms: Sequence[str], rounds: int, device: torch.device) -> list[Cost]:
    aligned: list[float] = []
    fast: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(rounds + 1):
        aligned.append(_timed(run, [], device))
        for form in forms:
            fast[form].append(_timed(run, list(ops.FAST_FORMS) if form == ALL else [form], device))
    return [_cost(what, form, aligned[1:], seconds[1:]) for form, seconds in fast.items()]


def _cost(what: str, form: str, aligned: Sequence[float], fast: Sequence[float]) -> Cost:
    ratios = [ours / theirs for ours, theirs in zip(aligned, fast, strict=True)]
    return Cost(what, form, median(aligned), median(fast), median(ratios), min(ratios), max(ratios))


def _timed(run: Callable[[], float], fast: Sequence[str], device: torch.device) -> float:
    ops.use_fast(fast)
    return run()


def _repeated(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Seconds of one call, timed over as many as last long enough for the clock."""
    call()
    count = max(1, round(MIN_TIMING_SECONDS / _seconds(call, device)))

    def run() -> float:
        def calls() -> None:
            for _ in range(count):
                call()

        return _seconds(calls, device) / count

    return run


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sampling(subject: Subject, load: Load) -> Callable[[], float]:
    config = dataclasses.replace(subject.config, eos_token_id=NEVER)
    policy = Policy(config, subject.dtype)
    policy.initialize(seed=0)
    rollout = RolloutConfig(max_batch=load.sequences, memory_mb=subject.memory_mb, prefix_cache=False)
    engine = Engine(policy.to_working_dtype(subject.device), rollout)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (load.sequences, load.prompt))
    sampling = SamplingParams(load.new_tokens)
    requests = [Request(index, ids, 1, sampling, seed=0, prompt=index) for index, ids in enumerate(prompts)]

    def run() -> float:
        return _seconds(lambda: engine.generate(requests), subject.device)

    return run


def _training(subject: Subject, load: Load) -> Callable[[], float]:
    config, length = subject.config, load.prompt + load.new_tokens
    policy = Policy(config, subject.dtype)
    policy.initialize(seed=0)
    settings = TrainerConfig(token_budget=max(subject.token_budget, length), learning_rate=1e-6)
    trainer = Trainer(policy.to(subject.device), settings, temperature=1.0)
    random = np.random.default_rng(0)
    # Log-probs of the uniform distribution, near those of an untrained policy.
    recorded = np.full(load.new_tokens, -np.log(config.vocab_size), dtype=np.float32)
    samples = [
        TrainSample(random.integers(0, config.vocab_size, length), load.prompt, recorded, (-1.0) ** index)
        for index in range(load.sequences)
    ]

    def step() -> None:
        trainer.compute(samples)
        trainer.apply()

    return lambda: _seconds(step, subject.device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores"
