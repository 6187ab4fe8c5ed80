"""Rotary angles stretched for a longer context, as Llama 3.1 does."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """`rope_scaling` of type llama3; field names are those of config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for got, rule in (
            (self.factor >= 1, "factor must be at least 1"),
            (
                0 < self.low_freq_factor < self.high_freq_factor,
                "low_freq_factor must lie between 0 and high_freq_factor",
            ),
            (self.original_max_position_embeddings >= 1, "original_max_position_embeddings must be at least 1"),
        ):
            if not got:
                raise ValueError(f"rope_scaling: {rule}; got {self}")

    def stretch(self, inverse: Tensor) -> Tensor:
        """Angle per position, any shape: kept where it turns often within the original context, divided by `factor`
        where it hardly turns, interpolated between."""
        turns = self.original_max_position_embeddings * inverse / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return inverse * (kept + (1.0 - kept) / self.factor)
