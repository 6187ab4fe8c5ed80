"""What the trainer learns from: sampled sequences, and several of them packed into one row of tokens.

Every [T] tensor is aligned to the token it describes: index t of `rollout_log_probs` is the log-probability of
`input_ids[t]`. A network predicts token t from row t - 1; that one shift is made in `PackedBatch.predictions`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TrainSample:
    """One prompt with one completion.

    input_ids: int64 [prompt length + completion length]. rollout_log_probs: float32 [completion length], the engine's
    record for each sampled token. advantage: shared by all tokens of the completion.
    Raises ValueError when lengths or dtypes disagree, or a number is not finite.
    """

    input_ids: IntArray
    prompt_length: int
    rollout_log_probs: FloatArray
    advantage: float

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length < len(self.input_ids):
            raise ValueError(
                f"prompt_length is {self.prompt_length} for {len(self.input_ids)} input_ids; a sample needs at least "
                "one prompt token and one completion token: leave out empty prompts and empty completions"
            )
        if len(self.rollout_log_probs) != self.completion_length:
            raise ValueError(
                f"{len(self.rollout_log_probs)} rollout_log_probs for a completion of {self.completion_length} tokens; "
                "pass one log-probability for each completion token and none for the prompt"
            )
        if self.input_ids.dtype != np.int64 or self.rollout_log_probs.dtype != np.float32:
            raise ValueError(
                f"input_ids are {self.input_ids.dtype} and rollout_log_probs {self.rollout_log_probs.dtype}; "
                "pass int64 and float32, so that no cast changes a bit"
            )
        if not (math.isfinite(self.advantage) and np.isfinite(self.rollout_log_probs).all()):
            raise ValueError(
                f"a number of the sample is not finite (advantage {self.advantage}, smallest rollout_log_prob "
                f"{self.rollout_log_probs.min()}); look at the reward and at the engine that sampled it"
            )

    @property
    def completion_length(self) -> int:
        return len(self.input_ids) - self.prompt_length

    @classmethod
    def demonstration(cls, input_ids: IntArray, prompt_length: int) -> TrainSample:
        """A completion to imitate: nobody sampled it, so it was certain (log-probability 0), with advantage 1."""
        return cls(input_ids, prompt_length, np.zeros(len(input_ids) - prompt_length, np.float32), 1.0)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Samples laid end to end: T tokens, each sequence from position 0.

    input_ids: int64 [T]. lengths: tokens of each sequence, in order. response_mask: bool [T], true on completion
    tokens. rollout_log_probs, advantages: float32 [T], zero on prompt tokens.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]
    response_mask: Tensor
    rollout_log_probs: Tensor
    advantages: Tensor

    @classmethod
    def pack(cls, samples: Sequence[TrainSample], device: torch.device | str = "cpu") -> PackedBatch:
        """Packs the samples in the order given; the tensors lie on `device`."""
        lengths = tuple(len(sample.input_ids) for sample in samples)
        input_ids = torch.from_numpy(np.concatenate([sample.input_ids for sample in samples]))
        response_mask = torch.zeros(sum(lengths), dtype=torch.bool)
        rollout_log_probs = torch.zeros(sum(lengths))
        advantages = torch.zeros(sum(lengths))
        start = 0
        for sample, length in zip(samples, lengths, strict=True):
            completion = slice(start + sample.prompt_length, start + length)
            response_mask[completion] = True
            rollout_log_probs[completion] = torch.from_numpy(sample.rollout_log_probs)
            advantages[completion] = sample.advantage
            start += length
        tensors = (input_ids, response_mask, rollout_log_probs, advantages)
        input_ids, response_mask, rollout_log_probs, advantages = (x.to(device) for x in tensors)
        return cls(input_ids, lengths, response_mask, rollout_log_probs, advantages)

    def predictions(self) -> tuple[Tensor, Tensor]:
        """(prediction_rows, targets), both int64 [N], for the N completion tokens in order.

        `hidden[prediction_rows[n]]` predicts `targets[n]`. A prompt has at least one token, so a row is always
        of the same sequence as its target.
        """
        positions = self.response_mask.nonzero().squeeze(1)
        return positions - 1, self.input_ids[positions]

    def split_completions(self, values: Tensor) -> list[FloatArray]:
        """Cuts float32 values [N] of the completion tokens into one array for each sequence."""
        completion_lengths = [int(mask.sum()) for mask in self.response_mask.cpu().split(list(self.lengths))]
        return [part.numpy().copy() for part in values.cpu().split(completion_lengths)]
