"""The sequences that hold a slot, as arrays indexed by slot: no Python work per token grows with the batch.

A sequence has `length` tokens, of which the first `computed` are in the cache. The engine computes what is missing: one
token while decoding, more where a prompt, or a sequence that lost its cache, has to catch up. A token is drawn when
nothing is missing.
"""

from itertools import pairwise

import numpy as np

import ops
from policy.config import PolicyConfig
from rollout.sequence import RECORDS, Sequence

NEVER = -1  # a token id that no token has, a position that none has
AHEAD = 16  # positions of a sequence whose numbers are made at once


class Running:
    def __init__(self, slots: int, config: PolicyConfig) -> None:
        self._policy_stops, self._chunk_size = config.stop_token_ids, config.chunk_size
        self.sequence: list[Sequence | None] = [None] * slots
        self.watched: set[int] = set()
        self.active = np.zeros(slots, dtype=bool)
        self.age = np.zeros(slots, dtype=np.int64)  # number of its admission
        self.request_id = np.zeros(slots, dtype=np.int64)
        self.length, self.computed, self.prompt_length, self.max_length, self.min_length = (
            np.zeros(slots, dtype=np.int64) for _ in range(5)
        )
        self.temperature, self.top_p, self.min_p = (np.zeros(slots, dtype=np.float32) for _ in range(3))
        self.top_k = np.zeros(slots, dtype=np.int64)
        self.seed = np.zeros(slots, dtype=np.uint64)
        self.address = np.zeros((3, slots), dtype=np.uint32)  # sample, prompt, step
        self.stop_ids = np.full((slots, len(self._policy_stops)), NEVER)
        self.num_blocks = np.zeros(slots, dtype=np.int64)
        self.block_table = np.zeros((slots, 1), dtype=np.int64)
        self.tokens = np.zeros((slots, 1), dtype=np.int64)
        self.log_probs = np.zeros((slots, 1), dtype=np.float32)
        self.processed = np.zeros((slots, 1), dtype=np.float32)
        self.versions = np.zeros((slots, 1), dtype=np.int64)
        self._uniforms, self._known = np.zeros((slots, AHEAD)), np.full((slots, AHEAD), NEVER)  # and their positions
        self._admitted = 0

    def slots(self) -> np.ndarray:
        """Those in use, ascending."""
        return np.flatnonzero(self.active)

    def by_age(self) -> np.ndarray:
        """Slots in use, the longest admitted first."""
        slots = self.slots()
        return slots[np.argsort(self.age[slots])]

    def blocks(self, slot: int) -> list[int]:
        blocks: list[int] = self.block_table[slot, : self.num_blocks[slot]].tolist()
        return blocks

    def start(self, slot: int, sequence: Sequence, blocks: list[int], computed: int) -> None:
        request, sampling, length = sequence.request, sequence.request.sampling, len(sequence.records["tokens"])
        prompt_length = len(request.prompt_ids)
        self._widen(prompt_length + sampling.max_new_tokens, len(sampling.stop_token_ids))
        self.sequence[slot], self.active[slot], self.request_id[slot] = sequence, True, request.request_id
        self.age[slot] = self._admitted = self._admitted + 1
        self.length[slot], self.computed[slot], self.prompt_length[slot] = length, computed, prompt_length
        self.max_length[slot] = prompt_length + sampling.max_new_tokens
        self.min_length[slot] = prompt_length + sampling.min_new_tokens
        self.temperature[slot], self.top_k[slot] = sampling.temperature, sampling.top_k
        self.top_p[slot], self.min_p[slot] = sampling.top_p, sampling.min_p
        self.seed[slot], self.address[:, slot] = request.seed, (sequence.sample, request.prompt, request.step)
        self._known[slot] = NEVER
        stops = [*self._policy_stops, *sampling.stop_token_ids]
        self.stop_ids[slot], self.stop_ids[slot, : len(stops)] = NEVER, stops
        self.num_blocks[slot] = 0
        self.add_blocks(slot, blocks)
        for name, values in sequence.records.items():
            getattr(self, name)[slot, :length] = values
        if sequence.is_watched:
            self.watched.add(slot)

    def stop(self, slot: int) -> Sequence:
        """Frees the slot; the sequence takes its records along."""
        sequence = self.sequence[slot]
        assert sequence is not None, f"slot {slot} is not in use"
        sequence.records = {name: values.copy() for name, values in self.records(slot).items()}
        self.active[slot], self.sequence[slot], self.num_blocks[slot] = False, None, 0
        self.watched.discard(slot)
        return sequence

    def records(self, slot: int) -> dict[str, np.ndarray]:
        return {name: getattr(self, name)[slot, : self.length[slot]] for name in RECORDS}

    def add_blocks(self, slot: int, blocks: list[int]) -> None:
        held = self.num_blocks[slot]
        self.block_table[slot, held : held + len(blocks)] = blocks
        self.num_blocks[slot] += len(blocks)

    def uniforms(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """FP64 [n]: the numbers at the addresses of tokens (design A8). Those of AHEAD positions are made together and
        wait here, as they cost no more than one."""
        if (slots[1:] == slots[:-1]).any():  # drafts
            return self._addressed(slots, positions)
        at = slots, positions % AHEAD
        missing = self._known[at] != positions
        if missing.any():
            rows, ahead = slots[missing][:, None], positions[missing][:, None] + np.arange(AHEAD)
            made = self._addressed(np.repeat(rows, AHEAD), ahead.ravel())
            self._uniforms[rows, ahead % AHEAD], self._known[rows, ahead % AHEAD] = made.reshape(ahead.shape), ahead
        found: np.ndarray = self._uniforms[at]
        return found

    def _addressed(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        addresses = np.concatenate([positions[None].astype(np.uint32), self.address[:, slots]])
        seeds = self.seed[slots]
        bounds = [0, *(np.flatnonzero(seeds[1:] != seeds[:-1]) + 1).tolist(), len(slots)]  # runs of equal seeds
        runs = pairwise(bounds)
        return np.concatenate([ops.addressed_uniform(int(seeds[a]), addresses[:, a:b]).numpy() for a, b in runs])

    def stops_at(self, slots: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """tokens [S, ...] of the slots -> are they stop tokens."""
        stops = self.stop_ids[slots].reshape(len(slots), *(1,) * (tokens.ndim - 1), -1)
        found: np.ndarray = (tokens[..., None] == stops).any(-1)
        return found

    def _widen(self, length: int, own_stops: int) -> None:
        """Makes room for sequences of `length` tokens and for their own stop tokens."""
        if (missing := length - self.tokens.shape[1]) > 0:
            for name in RECORDS:
                setattr(self, name, np.pad(getattr(self, name), ((0, 0), (0, missing))))
            columns = -(-length // self._chunk_size) - self.block_table.shape[1]
            self.block_table = np.pad(self.block_table, ((0, 0), (0, max(0, columns))))
        if (missing := len(self._policy_stops) + own_stops - self.stop_ids.shape[1]) > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=NEVER)
