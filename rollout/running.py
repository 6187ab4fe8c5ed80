"""The samples being decoded, as arrays indexed by slot, so that no Python work per token grows with the batch."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from torch import Tensor

from policy.config import PolicyConfig
from rollout.request import Completion
from rollout.scheduler import Group


class Running:
    def __init__(self, slots: int, config: PolicyConfig) -> None:
        self.stop_token_ids = np.array(config.stop_token_ids)
        self.active = np.zeros(slots, dtype=bool)
        self.done = np.zeros(slots, dtype=bool)
        self.length = np.zeros(slots, dtype=np.int64)  # tokens of the sequence so far, prompt included
        self.generated = np.zeros(slots, dtype=np.int64)
        self.limit = np.zeros(slots, dtype=np.int64)
        self.last_token = np.zeros(slots, dtype=np.int64)
        self.temperature, self.top_p = np.ones(slots, dtype=np.float32), np.ones(slots, dtype=np.float32)
        self.top_k = np.zeros(slots, dtype=np.int64)
        self.seed = np.zeros(slots, dtype=np.uint64)
        self.address = np.zeros((3, slots), dtype=np.uint32)  # sample, prompt, step
        self.block_table = np.zeros((slots, -(-config.max_position_embeddings // config.chunk_size)), dtype=np.int64)
        self.tokens = np.zeros((slots, 1), dtype=np.int64)
        self.log_probs = np.zeros((slots, 1), dtype=np.float32)
        self.versions = np.zeros((slots, 1), dtype=np.int64)
        self.group: list[Group | None] = [None] * slots
        self.index = [0] * slots
        self.full_vocab: dict[int, list[np.ndarray]] = {}
        self._aborted: set[int] = set()

    def rows(self) -> np.ndarray:
        """Slots of the samples that still run, ascending."""
        return np.flatnonzero(self.active & ~self.done)

    def start(self, slot: int, group: Group, index: int, blocks: np.ndarray) -> None:
        """The sample's prompt is in the cache; its first token is drawn next."""
        request, sample = group.request, group.samples[index]
        self._reserve(request.sampling.max_new_tokens)
        self.group[slot], self.index[slot] = group, index
        self.active[slot], self.done[slot] = True, False
        self.length[slot], self.generated[slot] = len(request.prompt_ids), 0
        self.limit[slot] = request.sampling.max_new_tokens
        self.temperature[slot], self.top_p[slot] = request.sampling.temperature, request.sampling.top_p
        self.top_k[slot], self.seed[slot] = request.sampling.top_k, request.seed
        self.address[:, slot] = sample, request.prompt, request.step
        self.block_table[slot, : len(blocks)] = blocks
        if sample in request.full_vocab_samples:
            self.full_vocab[slot] = []

    def addresses_by_seed(self, slots: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Runs of equal seeds in the order of `slots`: the seed and uint32 [4, n] (position, sample, prompt, step)."""
        addresses = np.concatenate([self.length[None, slots].astype(np.uint32), self.address[:, slots]])
        seeds = self.seed[slots]
        bounds = [0, *(np.flatnonzero(seeds[1:] != seeds[:-1]) + 1).tolist(), len(slots)]
        for begin, end in pairwise(bounds):
            yield int(seeds[begin]), addresses[:, begin:end]

    def append(self, slots: np.ndarray, tokens: np.ndarray, log_probs: np.ndarray, version: int, rows: Tensor) -> None:
        """Records one drawn token for each slot; rows: log-probs over the vocabulary, FP32 [len(slots), V]."""
        at = self.generated[slots]
        self.tokens[slots, at], self.log_probs[slots, at], self.versions[slots, at] = tokens, log_probs, version
        self.last_token[slots] = tokens
        self.length[slots] += 1
        self.generated[slots] += 1
        stopped = (tokens[:, None] == self.stop_token_ids).any(1)
        self.done[slots] = stopped | (self.generated[slots] >= self.limit[slots])
        for slot in self.full_vocab.keys() & set(slots.tolist()) if self.full_vocab else ():
            self.full_vocab[slot].append(rows[int(np.flatnonzero(slots == slot)[0])].cpu().numpy().copy())

    def abort(self, request_id: int) -> None:
        for slot in self.rows().tolist():
            group = self.group[slot]
            if group is not None and group.request.request_id == request_id:
                self.done[slot] = True
                self._aborted.add(slot)

    def ended(self) -> list[int]:
        slots: list[int] = np.flatnonzero(self.active & self.done).tolist()
        return slots

    def finish(self, slot: int) -> Completion:
        """The completion of an ended sample; the slot is free afterwards."""
        group, count = self.group[slot], self.generated[slot]
        assert group is not None and self.active[slot]
        rows = self.full_vocab.pop(slot, None)
        reason = "stop" if count and self.tokens[slot, count - 1] in self.stop_token_ids else "length"
        completion = Completion(
            request_id=group.request.request_id,
            sample=group.samples[self.index[slot]],
            token_ids=self.tokens[slot, :count].copy(),
            log_probs=self.log_probs[slot, :count].copy(),
            policy_versions=self.versions[slot, :count].copy(),
            finish_reason="abort" if slot in self._aborted else reason,
            full_log_probs=np.stack(rows) if rows else None,
        )
        self.active[slot], self.group[slot] = False, None
        self._aborted.discard(slot)
        return completion

    def _reserve(self, new_tokens: int) -> None:
        missing = new_tokens - self.tokens.shape[1]
        if missing > 0:
            room = ((0, 0), (0, missing))
            self.tokens, self.versions = np.pad(self.tokens, room), np.pad(self.versions, room)
            self.log_probs = np.pad(self.log_probs, room)
