"""The sample and what this process computes from it: the log-probs that the recipe's settings should have given.

A side whose record has those is right; the other's is what a hypothesis has to explain. A hypothesis explains a record
when it gives the same bits, or leaves a difference at least EXPLAINED times smaller than there was.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as List
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import ops
from policy.checkpoint import DTYPES, load_policy
from policy.machine import choose_device
from policy.tokenizer import load_tokenizer
from policy.transformer import Policy
from rl.diagnose.sample import Sample, Sequence, load_sample

EXPLAINED = 100.0


class Evidence:
    """Raises ValueError when the folder holds no sample."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sample: Sample = load_sample(folder)

    @cached_property
    def policy(self) -> Policy:
        """The trainer's weights."""
        return self.load_policy()

    def load_policy(self) -> Policy:
        dtype = DTYPES[self.sample.recipe.policy.dtype]
        return load_policy(self.folder / "policy", dtype).to_working_dtype(choose_device("auto"))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder / "policy")

    @property
    def has_witnessed_weights(self) -> bool:
        """Whether digests and traces are of the weights that are here."""
        return self.sample.witness_version == self.sample.policy_version

    @property
    def sequences(self) -> list[Sequence]:
        return self.sample.sequences

    @cached_property
    def hidden(self) -> list[Tensor]:
        """Of every sequence, FP32 [tokens - 1, D]: row t predicts token t + 1."""
        return [self.hidden_states(self.policy, each.token_ids) for each in self.sequences]

    @cached_property
    def reference(self) -> list[np.ndarray]:
        """Log-probs of every token but the first of each sequence, float32 [tokens - 1]."""
        pairs = zip(self.hidden, self.sequences, strict=True)
        return [self.log_probs(self.policy, hidden, each.token_ids[1:]) for hidden, each in pairs]

    @torch.no_grad()
    def hidden_states(self, policy: Policy, token_ids: np.ndarray) -> Tensor:
        layout = ops.ChunkLayout.build([len(token_ids) - 1], policy.config.chunk_size, device=policy.device)
        hidden: Tensor = policy(torch.from_numpy(token_ids[:-1]).to(policy.device), layout)
        return hidden

    @torch.no_grad()
    def log_probs(
        self, policy: Policy, hidden: Tensor, targets: np.ndarray, temperature: float | None = None
    ) -> np.ndarray:
        """hidden [N, D], targets int64 [N] -> float32 [N]; by default under the recipe's temperature."""
        ids = torch.from_numpy(targets).to(policy.device)
        found: np.ndarray = policy.log_probs(hidden, ids, temperature or self.sample.temperature)[0].cpu().numpy()
        return found

    def completion(self, each: Sequence, policy: Policy | None = None, prompt: np.ndarray | None = None) -> np.ndarray:
        """Log-probs of the completion by a forward of `policy`, float32 [n]; `prompt` replaces the recorded one."""
        policy, prompt = policy or self.policy, each.prompt_ids if prompt is None else prompt
        hidden = self.hidden_states(policy, np.concatenate([prompt, each.completion_ids]))
        return self.log_probs(policy, hidden[len(prompt) - 1 :], each.completion_ids)

    @cached_property
    def expected(self) -> list[np.ndarray]:
        """Log-probs of every completion, float32 [n] each, as they should be."""
        pairs = zip(self.reference, self.sequences, strict=True)
        return [row[len(each.prompt_ids) - 1 :] for row, each in pairs]

    @cached_property
    def suspect(self) -> str:
        """ "engine" or "trainer": whose record is further from what it should be."""
        engine, trainer = (gap(self.expected, self._records(side)) for side in ("engine", "trainer"))
        return "trainer" if trainer > engine else "engine"

    @property
    def observed(self) -> list[np.ndarray]:
        """The suspect's record."""
        return self._records(self.suspect)

    def _records(self, side: str) -> list[np.ndarray]:
        return [each.rollout_log_probs if side == "engine" else each.log_probs for each in self.sequences]

    @cached_property
    def mismatch(self) -> float:
        """Largest difference between the two records, nats."""
        return gap(self._records("engine"), self._records("trainer"))

    @cached_property
    def base_gap(self) -> float:
        """Largest difference of the suspect's record from what it should be, nats."""
        return gap(self.expected, self.observed)

    def residual(self, hypothesis: Callable[[int], np.ndarray]) -> float | None:
        """What a hypothesis leaves of the suspect's difference, in nats; None if it does not explain it.

        hypothesis: place of a sequence -> the record that it would have, float32 [n]. Sequences that differ most are
        tried first, so that a wrong one costs little.
        """
        if not self.mismatch:
            return None
        left = 0.0
        for place in self.worst_first:
            left = max(left, gap([hypothesis(place)], [self.observed[place]]))
            if not is_explained(self.base_gap, left):
                return None
        return left

    @cached_property
    def worst_first(self) -> list[int]:
        """Places of the sequences by how far the suspect's record is off."""
        apart = [gap([mine], [theirs]) for mine, theirs in zip(self.expected, self.observed, strict=True)]
        return sorted(range(len(apart)), key=lambda place: -apart[place])


def is_explained(difference: float, left: float) -> bool:
    """Whether little enough is left of a difference. What is not finite cannot be explained."""
    return 0 < difference < math.inf and left <= difference / EXPLAINED


def gap(ours: List[np.ndarray], theirs: List[np.ndarray]) -> float:
    """Largest difference of two lists of log-probs; infinity where one is NaN."""
    pairs = zip(ours, theirs, strict=True)
    apart = [np.abs(mine.astype(np.float64) - other.astype(np.float64)).max(initial=0.0) for mine, other in pairs]
    return float(np.nan_to_num(np.max(apart, initial=0.0), nan=np.inf))
