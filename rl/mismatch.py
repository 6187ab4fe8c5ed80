"""The check that gives the project its name: trainer log-probs against the engine's record, bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


class MismatchError(ValueError):
    """A trainer log-probability differs from the sampler's in a run that promised it would not."""


@dataclass(frozen=True)
class Sampled:
    """Where a completion comes from, for the message."""

    prompt_id: str
    sample: int


@dataclass
class Comparison:
    """Pools over sequences; `first` describes the first unequal token. values: further metrics of the step."""

    step: int
    tokens_compared: int = 0
    tokens_unequal: int = 0
    full_vocab_rows: int = 0
    full_vocab_unequal: int = 0
    first: str | None = None
    values: dict[str, float] = field(default_factory=dict)

    def add(self, where: Sampled, log_probs: np.ndarray, rollout_log_probs: np.ndarray) -> None:
        """Compares one sequence, float32 [n] each. NaN equals nothing."""
        unequal = ~(log_probs == rollout_log_probs)
        self.tokens_compared += len(log_probs)
        self.tokens_unequal += int(unequal.sum())
        if unequal.any() and self.first is None:
            token = int(unequal.argmax())
            self.first = (
                f"step {self.step}, prompt {where.prompt_id}, sample {where.sample}, completion token {token}: "
                f"trainer {float(log_probs[token])!r}, engine {float(rollout_log_probs[token])!r}"
            )

    def add_full_vocab(self, where: Sampled, log_probs: np.ndarray, rollout_log_probs: np.ndarray) -> None:
        """Compares one sequence over the whole vocabulary, float32 [n, V] each."""
        unequal = ~(log_probs == rollout_log_probs)
        self.full_vocab_rows += len(log_probs)
        self.full_vocab_unequal += int(unequal.sum())
        if unequal.any() and self.first is None:
            token, entry = (int(index[0]) for index in np.nonzero(unequal))
            self.first = (
                f"step {self.step}, prompt {where.prompt_id}, sample {where.sample}, completion token {token}, "
                f"vocabulary entry {entry}: "
                f"trainer {float(log_probs[token, entry])!r}, engine {float(rollout_log_probs[token, entry])!r}"
            )

    @property
    def is_exact(self) -> bool:
        return self.tokens_unequal == 0 and self.full_vocab_unequal == 0

    def message(self) -> str:
        return (
            f"trainer and engine disagree on {self.tokens_unequal} of {self.tokens_compared} sampled tokens and "
            f"{self.full_vocab_unequal} entries of {self.full_vocab_rows} full-vocabulary rows; first at {self.first}"
        )

    def metrics(self) -> dict[str, float]:
        return {
            **self.values,
            "mismatch/tokens_compared": self.tokens_compared,
            "mismatch/tokens_unequal": self.tokens_unequal,
            "mismatch/full_vocab_rows": self.full_vocab_rows,
            "mismatch/full_vocab_unequal": self.full_vocab_unequal,
        }


def full_vocab_choice(seed: int, step: int, pairs: Sequence[tuple[int, int]], count: int) -> dict[int, tuple[int, ...]]:
    """A seeded choice of `count` (prompt, sample) pairs of a step, as prompt -> samples: those whose log-probs are
    compared over the whole vocabulary."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    chosen = generator.choice(len(pairs), size=min(count, len(pairs)), replace=False)
    found: dict[int, tuple[int, ...]] = {}
    for prompt, sample in sorted(pairs[index] for index in chosen):
        found[prompt] = (*found.get(prompt, ()), sample)
    return found
