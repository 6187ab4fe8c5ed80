"""What the trainer learns from: sampled sequences, and several of them packed into one row of tokens.

Every [T] tensor is aligned to the token it describes: index t of `rollout_log_probs` is the log-probability of
`input_ids[t]`. A network predicts token t from row t - 1; that one shift is made in `PackedBatch.predictions`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from policy.routing import UNKNOWN, Routing

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
ExpertArray = npt.NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class TrainSample:
    """One prompt with one completion.

    input_ids: int64 [prompt length + completion length]. rollout_log_probs: float32 [completion length], the engine's
    record for each sampled token. advantage: shared by all tokens of the completion. routed_experts: int16 [tokens - 1,
    mixture layers, k], the experts that the engine sent each token but the last to, for the trainer to replay; -1 where
    it kept no record. None lets the trainer's router decide. routed_weights: float32, shaped alike, with what weights
    it did, to be replayed too; NaN where it kept no record. None leaves them to the trainer's router.
    Raises ValueError when lengths or dtypes disagree, or a number is not finite.
    """

    input_ids: IntArray
    prompt_length: int
    rollout_log_probs: FloatArray
    advantage: float
    routed_experts: ExpertArray | None = None
    routed_weights: FloatArray | None = None

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
        if self.routed_experts is not None:
            self._check_experts(self.routed_experts)
        if self.routed_weights is not None:
            self._check_weights(self.routed_weights)

    def _check_experts(self, experts: ExpertArray) -> None:
        if experts.dtype != np.int16 or experts.ndim != 3 or len(experts) != len(self.input_ids) - 1:
            raise ValueError(
                f"routed_experts are {experts.dtype} {list(experts.shape)} for {len(self.input_ids)} input_ids; pass "
                "int16 [tokens - 1, mixture layers, k]: the last token was never computed by the engine"
            )
        ordered = np.sort(experts, axis=-1)
        known = ordered[..., 0] >= 0
        if (ordered[~known] != UNKNOWN).any() or (ordered[known][:, 1:] == ordered[known][:, :-1]).any():
            raise ValueError(
                f"routed_experts of a token must be different experts, or {UNKNOWN} throughout where there is no record"
            )

    def _check_weights(self, weights: FloatArray) -> None:
        experts = self.routed_experts
        if experts is None or weights.dtype != np.float32 or weights.shape != experts.shape:
            raise ValueError(
                f"routed_weights are {weights.dtype} {list(weights.shape)} for routed_experts of "
                f"{None if experts is None else list(experts.shape)}; pass float32 of the same shape, or neither"
            )
        if (np.isfinite(weights) != (experts != UNKNOWN)).any():
            raise ValueError("routed_weights must be finite where routed_experts are known, and NaN where they are not")

    @property
    def completion_length(self) -> int:
        return len(self.input_ids) - self.prompt_length

    def without_routes(self) -> TrainSample:
        """Left to the trainer's router."""
        return replace(self, routed_experts=None, routed_weights=None)

    @classmethod
    def demonstration(cls, input_ids: IntArray, prompt_length: int) -> TrainSample:
        """A completion to imitate: nobody sampled it, so it was certain (log-probability 0), with advantage 1."""
        return cls(input_ids, prompt_length, np.zeros(len(input_ids) - prompt_length, np.float32), 1.0)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Samples laid end to end: T tokens, each sequence from position 0.

    input_ids: int64 [T]. lengths: tokens of each sequence, in order. response_mask: bool [T], true on completion
    tokens. rollout_log_probs, advantages: float32 [T], zero on prompt tokens. routed_experts: int16 [T, mixture layers,
    k], UNKNOWN where a sample has no record, or None where none has. routed_weights: float32, likewise with NaN.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]
    response_mask: Tensor
    rollout_log_probs: Tensor
    advantages: Tensor
    routed_experts: Tensor | None = None
    routed_weights: Tensor | None = None

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
        experts = _pack_routes(samples, "routed_experts", UNKNOWN, device)
        weights = _pack_routes(samples, "routed_weights", np.nan, device)
        return cls(input_ids, lengths, response_mask, rollout_log_probs, advantages, experts, weights)

    @property
    def completion_lengths(self) -> list[int]:
        """Completion tokens of each sequence."""
        return [int(mask.sum()) for mask in self.response_mask.cpu().split(list(self.lengths))]

    def routing(self) -> Routing | None:
        """For one forward of the batch."""
        return None if self.routed_experts is None else Routing(self.routed_experts, self.routed_weights)

    def predictions(self) -> tuple[Tensor, Tensor]:
        """(prediction_rows, targets), both int64 [N], for the N completion tokens in order.

        `hidden[prediction_rows[n]]` predicts `targets[n]`. A prompt has at least one token, so a row is always
        of the same sequence as its target.
        """
        positions = self.response_mask.nonzero().squeeze(1)
        return positions - 1, self.input_ids[positions]

    def split_completions(self, values: Tensor) -> list[FloatArray]:
        """Cuts float32 values [N] of the completion tokens into one array for each sequence."""
        return [part.numpy().copy() for part in values.cpu().split(self.completion_lengths)]

    def split_experts(self, chosen: Tensor) -> list[ExpertArray]:
        """Cuts int16 expert ids [T, mixture layers, k] into one array [tokens - 1, ...] for each sequence."""
        return [part[:-1].numpy().copy() for part in chosen.cpu().split(list(self.lengths))]


def _pack_routes(
    samples: Sequence[TrainSample],
    name: Literal["routed_experts", "routed_weights"],
    unknown: float,
    device: torch.device | str,
) -> Tensor | None:
    """A record of the samples, [T, mixture layers, k], or None where no sample has one."""
    records: list[ExpertArray | FloatArray | None] = [getattr(sample, name) for sample in samples]
    some = next((record for record in records if record is not None), None)
    if some is None:
        return None
    packed = np.full((sum(len(sample.input_ids) for sample in samples), *some.shape[1:]), unknown, some.dtype)
    start = 0
    for sample, record in zip(samples, records, strict=True):
        if record is not None:
            packed[start : start + len(record)] = record
        start += len(sample.input_ids)
    return torch.from_numpy(packed).to(device)
