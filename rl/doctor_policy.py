"""Doctor's rehearsal: a tiny policy of every layer kind samples with the engine and goes through the trainer.

What the operator probes show piece by piece must hold for the whole: the engine's record equals the trainer's
log-probs in every bit (design A7), at any thread counts on the two sides, and a backward pass repeats itself (A9).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from policy.config import PolicyConfig
from policy.transformer import Policy
from rl.doctor_probe import torch_threads
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Completion, Request, SamplingParams
from trainer.batch import TrainSample
from trainer.config import TrainerConfig
from trainer.trainer import Trainer

# Weights of this size spread the log-probs, so that a wrong bit has somewhere to show.
CONFIG = PolicyConfig(
    vocab_size=512,
    num_hidden_layers=2,
    layer_group_size=2,
    n_group=2,
    max_position_embeddings=64,
    initializer_range=0.1,
    chunk_size=16,
)
PROMPT_LENGTHS, SAMPLES, NEW_TOKENS, TEMPERATURE, SEED = (5, 16, 23, 40), 4, 18, 0.8, 0


def find_mismatch(dtype: torch.dtype, thread_counts: Sequence[int]) -> str | None:
    """Engine and trainer at every thread count, all against the engine at the first: a sentence, or None."""
    record: list[TrainSample] = []
    for threads in thread_counts:
        with torch_threads(threads):
            samples = _generate(dtype)
            record = record or samples
            log_probs = _trainer(dtype).log_probs(record)
        if not all(map(_same_draw, record, samples)):
            return f"the engine samples other tokens or log-probs at {threads} threads than at {thread_counts[0]}"
        if unequal := sum(_unequal(one.rollout_log_probs, two) for one, two in zip(record, log_probs, strict=True)):
            total = sum(sample.completion_length for sample in record)
            return f"{unequal} of {total} log-probs differ: engine {thread_counts[0]} threads, trainer {threads}"
    return None


def find_unrepeatable(dtype: torch.dtype, threads: int) -> str | None:
    """Two backward passes over the same samples: how many gradients differ, or None."""
    samples = [TrainSample.demonstration(prompt, prompt_length=1) for prompt in _prompts() * SAMPLES]
    with torch_threads(threads), _deterministic():
        one, other = (_gradients(dtype, samples) for _ in range(2))
    differing = [name for name, gradient in one.items() if not torch.equal(gradient, other[name])]
    return f"{len(differing)} of {len(one)} gradients differ, the first {differing[0]}" if differing else None


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _policy(dtype: torch.dtype) -> Policy:
    policy = Policy(CONFIG, dtype)
    policy.initialize(SEED)
    return policy


def _trainer(dtype: torch.dtype) -> Trainer:
    return Trainer(_policy(dtype), TrainerConfig(token_budget=512), TEMPERATURE)


def _generate(dtype: torch.dtype) -> list[TrainSample]:
    """What the engine samples, each prompt several times."""
    # Fewer places than samples and fewer prefill tokens than the longest prompt: batches change and prompts are cut.
    engine = Engine(_policy(dtype).to_working_dtype(), RolloutConfig(max_batch=10, prefill_tokens=32, memory_mb=16))
    sampling, prompts = SamplingParams(NEW_TOKENS, TEMPERATURE), _prompts()
    requests = [Request(i, prompt, SAMPLES, sampling, SEED, prompt=i) for i, prompt in enumerate(prompts)]
    return [_train_sample(prompts[done.request_id], done) for done in engine.generate(requests)]


def _train_sample(prompt: np.ndarray, completion: Completion) -> TrainSample:
    input_ids = np.concatenate([prompt, completion.token_ids])
    return TrainSample(input_ids, len(prompt), completion.log_probs, advantage=1.0)


def _prompts() -> list[np.ndarray]:
    random = np.random.default_rng(SEED)
    return [random.integers(1, CONFIG.vocab_size, length) for length in PROMPT_LENGTHS]


def _gradients(dtype: torch.dtype, samples: list[TrainSample]) -> dict[str, Tensor]:
    trainer = _trainer(dtype)
    trainer.compute(samples)
    return {name: p.grad for name, p in trainer.policy.named_parameters() if p.grad is not None}


def _same_draw(one: TrainSample, two: TrainSample) -> bool:
    same_tokens = np.array_equal(one.input_ids, two.input_ids)
    return same_tokens and _unequal(one.rollout_log_probs, two.rollout_log_probs) == 0


def _unequal(one: np.ndarray, other: np.ndarray) -> int:
    """How many float32 differ in any bit."""
    return int((one.view(np.int32) != other.view(np.int32)).sum())
