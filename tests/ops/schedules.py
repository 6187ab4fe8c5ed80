"""How an engine may cut sequences into forwards: shared by the tests of both attention operators and of the policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from hypothesis import strategies as st

import ops

MAX_LENGTH = 70
EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, MAX_LENGTH)

Piece = tuple[int, int, int]  # sequence, first position, end position


@dataclass(frozen=True)
class Schedule:
    """steps: one forward each, with its pieces in batch order. slots, blocks: where the pools keep each sequence."""

    chunk_size: int
    lengths: list[int]
    steps: list[list[Piece]]
    slots: np.ndarray  # int64 [S]
    blocks: np.ndarray  # int64 [S, blocks of the longest possible sequence]

    @property
    def pool_slots(self) -> int:
        return len(self.lengths) + 2

    @property
    def pool_blocks(self) -> int:
        return self.blocks.size + 3

    def layout(self, step: Sequence[Piece]) -> ops.ChunkLayout:
        return ops.ChunkLayout.build([end - begin for _, begin, end in step], self.chunk_size, [b for _, b, _ in step])

    def tokens(self, step: Sequence[Piece]) -> torch.Tensor:
        """Where the step's tokens lie among all sequences, packed one after another."""
        first = np.cumsum([0, *self.lengths])
        return torch.cat([torch.arange(first[s] + begin, first[s] + end) for s, begin, end in step])


@st.composite
def schedules(draw: st.DrawFn, max_sequences: int = 4) -> Schedule:
    """Any lengths, any cuts, any mix of decode and prefill, any order, sequences scattered over the pools."""
    chunk = draw(st.sampled_from([16, 32]))
    length = st.one_of(st.sampled_from(EDGES), st.integers(1, MAX_LENGTH))
    lengths = draw(st.lists(length, min_size=1, max_size=max_sequences))
    decoding = draw(st.sampled_from([0.0, 0.5, 1.0]))  # share of pieces that are one token
    random = Random(draw(st.integers(0, 2**32)))
    blocks_each = -(-MAX_LENGTH // chunk)
    scattered = np.array(random.sample(range(len(lengths) * blocks_each + 3), len(lengths) * blocks_each))
    slots = np.array(random.sample(range(len(lengths) + 2), len(lengths)))
    return Schedule(chunk, lengths, _steps(lengths, decoding, random), slots, scattered.reshape(-1, blocks_each))


def _steps(lengths: list[int], decoding: float, random: Random) -> list[list[Piece]]:
    done, steps = [0] * len(lengths), []
    while waiting := [s for s, length in enumerate(lengths) if done[s] < length]:
        step = []
        for s in random.sample(waiting, random.randint(1, len(waiting))):
            piece = 1 if random.random() < decoding else random.randint(1, lengths[s] - done[s])
            step.append((s, done[s], done[s] + piece))
            done[s] += piece
        steps.append(step)
    return steps
