"""Who runs next: requests wait until their whole need of memory fits, then their prompt is computed, once per group.

Memory is reserved at admission for the longest possible completions, so nothing that runs is ever preempted.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from rollout.memory import BlockPool, SlotPool
from rollout.request import Request


@dataclass
class Group:
    """One request (or as many of its samples as run at once) on its way through the engine."""

    request: Request
    samples: range
    slots: list[int] = field(default_factory=list)  # one per sample; the first computes the prompt
    prompt_blocks: list[int] = field(default_factory=list)  # full blocks of the prompt, shared by all samples
    own_blocks: list[list[int]] = field(default_factory=list)  # per sample: from the first block it writes alone
    computed: int = 0  # prompt tokens computed so far

    @property
    def is_prefilled(self) -> bool:
        return self.computed == len(self.request.prompt_ids)


@dataclass(frozen=True)
class Piece:
    """Prompt tokens of one group to compute now: positions begin .. end - 1."""

    group: Group
    begin: int
    end: int


class Scheduler:
    def __init__(self, slots: SlotPool, blocks: BlockPool, chunk_size: int, prefill_tokens: int) -> None:
        self.slots, self.blocks = slots, blocks
        self.chunk_size, self.prefill_tokens = chunk_size, prefill_tokens
        self.waiting: deque[Group] = deque()
        self.prefilling: list[Group] = []

    def blocks_needed(self, request: Request) -> tuple[int, int]:
        """(blocks of the prompt that all samples share, blocks each sample writes alone)."""
        shared = len(request.prompt_ids) // self.chunk_size
        total = -(-(len(request.prompt_ids) + request.sampling.max_new_tokens) // self.chunk_size)
        return shared, total - shared

    def admit(self) -> list[Group]:
        """Moves waiting groups to prefill, first come first served, while slots and blocks last."""
        admitted = []
        while self.waiting:
            group = self.waiting[0]
            shared, own = self.blocks_needed(group.request)
            if self.slots.num_free < len(group.samples) or self.blocks.num_free < shared + own * len(group.samples):
                break
            group.slots = self.slots.take(len(group.samples))
            group.prompt_blocks = self.blocks.take(shared)
            group.own_blocks = [self.blocks.take(own) for _ in group.samples]
            self.blocks.share(group.prompt_blocks, len(group.samples) - 1)
            self.prefilling.append(self.waiting.popleft())
            admitted.append(group)
        return admitted

    def next_pieces(self) -> list[Piece]:
        """Prompt pieces of this step, under the token budget."""
        room, pieces = self.prefill_tokens, []
        for group in self.prefilling:
            size = min(room, len(group.request.prompt_ids) - group.computed)
            if size == 0:
                break
            pieces.append(Piece(group, group.computed, group.computed + size))
            room -= size
        return pieces

    def advance(self, pieces: list[Piece]) -> list[Group]:
        """Records computed pieces; returns the groups whose prompt is now complete."""
        for piece in pieces:
            piece.group.computed = piece.end
        done = [piece.group for piece in pieces if piece.group.is_prefilled]
        self.prefilling = [group for group in self.prefilling if not group.is_prefilled]
        return done

    def drop(self, request_id: int) -> list[Group]:
        """Takes out what a request has waiting or in prefill, and gives back what that held."""
        dropped = [group for group in (*self.prefilling, *self.waiting) if group.request.request_id == request_id]
        self.prefilling = [group for group in self.prefilling if group.request.request_id != request_id]
        self.waiting = deque(group for group in self.waiting if group.request.request_id != request_id)
        for group in dropped:
            for index in range(len(group.slots)):  # a waiting group holds none
                self.release(group, index)
        return dropped

    def block_row(self, group: Group, index: int) -> np.ndarray:
        return np.array(group.prompt_blocks + group.own_blocks[index], dtype=np.int64)

    def release(self, group: Group, index: int) -> None:
        """Gives back everything one sample of a group held."""
        self.slots.give_back(group.slots[index])
        self.blocks.give_back(group.prompt_blocks + group.own_blocks[index])
