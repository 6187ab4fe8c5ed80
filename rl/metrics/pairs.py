"""Log-probabilities of the same tokens from two sides, pooled so that no metric depends on who computed which part.

What ranks and micro-batches hand over is the pairs themselves, 8 bytes a token, in whole sequences. Sums run within a
sequence first and then, correctly rounded (`math.fsum`), over sequences; quantiles sort. So any partition of the
sequences, in any order, gives the same numbers to the last bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# verl, slime and others clamp a log-ratio so before they exponentiate it.
SAFETY_BOUND = 20.0


@dataclass(frozen=True, eq=False)
class Pairs:
    """The N tokens that a mask leaves of S sequences, laid end to end.

    train, rollout: float64 [N], log-probabilities of the trainer and of the sampler. lengths: int64 [S], 0 for a
    sequence whose mask is empty. positions: int64 [N], place of a token in its completion, masked tokens counted.
    """

    train: np.ndarray
    rollout: np.ndarray
    lengths: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(
        cls,
        train: Sequence[np.ndarray],
        rollout: Sequence[np.ndarray],
        masks: Sequence[np.ndarray] | None = None,
    ) -> "Pairs":
        """One array [completion length] of each kind a sequence; a mask is true where a token counts, by default
        everywhere. Raises ValueError when shapes disagree."""
        masks = [np.ones(len(each), dtype=bool) for each in train] if masks is None else masks
        if not len(train) == len(rollout) == len(masks):
            raise ValueError(
                f"{len(train)} sequences of trainer log-probs, {len(rollout)} of the sampler's and {len(masks)} masks; "
                "pass as many of each"
            )
        for index, sides in enumerate(zip(train, rollout, masks, strict=True)):
            if len({each.shape for each in sides}) > 1:
                shapes = ", ".join(str(each.shape) for each in sides)
                raise ValueError(
                    f"sequence {index}: shapes {shapes} of trainer log-probs, sampler log-probs and mask; they must be "
                    "equal, as all three describe the same tokens"
                )
        kept = [np.asarray(mask, dtype=bool) for mask in masks]
        return cls(
            train=_joined([values[mask] for values, mask in zip(train, kept, strict=True)], np.float64),
            rollout=_joined([values[mask] for values, mask in zip(rollout, kept, strict=True)], np.float64),
            lengths=np.array([int(mask.sum()) for mask in kept], dtype=np.int64),
            positions=_joined([np.flatnonzero(mask) for mask in kept], np.int64),
        )

    @classmethod
    def pool(cls, parts: Sequence["Pairs"]) -> "Pairs":
        """The sequences of all parts."""
        return cls(
            train=_joined([part.train for part in parts], np.float64),
            rollout=_joined([part.rollout for part in parts], np.float64),
            lengths=_joined([part.lengths for part in parts], np.int64),
            positions=_joined([part.positions for part in parts], np.int64),
        )

    @property
    def tokens(self) -> int:
        return len(self.train)

    @cached_property
    def log_ratio(self) -> np.ndarray:
        """log(pi_train / pi_rollout) of every token."""
        return self.train - self.rollout

    @cached_property
    def bounded_ratio(self) -> np.ndarray:
        """pi_train / pi_rollout, the log clamped to +-SAFETY_BOUND."""
        return bounded_exp(self.log_ratio)

    def sequence_sums(self, values: np.ndarray) -> np.ndarray:
        """[S], the sum of `values` [N] over each sequence; 0 for an empty one."""
        sums, filled = np.zeros(len(self.lengths)), self.lengths > 0
        if filled.any():
            sums[filled] = np.add.reduceat(values, (np.cumsum(self.lengths) - self.lengths)[filled])
        return sums

    def sequence_means(self, values: np.ndarray) -> np.ndarray:
        """[S]; 0 for an empty sequence, as masked means are in verl and slime."""
        return self.sequence_sums(values) / np.maximum(self.lengths, 1)

    def mean(self, values: np.ndarray) -> float:
        """Over all tokens; NaN when there is none."""
        return exact_sum(self.sequence_sums(values)) / self.tokens if self.tokens else math.nan

    def variance(self, values: np.ndarray) -> float:
        """Over all tokens, divided by their number."""
        return self.mean((values - self.mean(values)) ** 2)

    def unbiased_std(self, values: np.ndarray) -> float:
        """Divided by N - 1, as torch does; NaN below two tokens."""
        return math.sqrt(self.variance(values) * self.tokens / (self.tokens - 1)) if self.tokens > 1 else math.nan


def exact_sum(values: np.ndarray) -> float:
    """The correctly rounded sum, which no order changes; IEEE's where a value is not finite."""
    if np.isfinite(values).all():
        return math.fsum(values.tolist())
    with np.errstate(invalid="ignore"):
        return float(values.sum())


def exact_mean(values: np.ndarray) -> float:
    """NaN of nothing."""
    return exact_sum(values) / len(values) if len(values) else math.nan


def bounded_exp(log_values: np.ndarray) -> np.ndarray:
    return np.exp(np.clip(log_values, -SAFETY_BOUND, SAFETY_BOUND))


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(array.astype(dtype) for array in arrays)])
