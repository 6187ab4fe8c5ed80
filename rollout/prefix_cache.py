"""Prompts that begin alike are computed once: what is kept of full chunks, for both kinds of layers.

A chunk is known by the policy version, the chunk before it and its own tokens. Its key-value block is shared by
reference count. The state of lightning layers at its end is a snapshot, which a sequence that begins there copies into
its slot. A snapshot is as large as many blocks, so only two places of a prompt get one: its last full chunk, where the
same prompt asked again goes on, and the place where a prompt was seen to part from an earlier one, where the next that
shares the beginning will part too. Both kinds of memory are reused longest unused first.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count

import numpy as np

from rollout.memory import BlockPool

Key = tuple[int, int, bytes]  # policy version, serial number of the chunk before (-1: none), token ids


@dataclass(eq=False)
class CachedChunk:
    key: Key
    serial: int
    block: int
    routes: np.ndarray | None  # of its C tokens, where they are recorded
    snapshot: int | None = None


@dataclass(frozen=True)
class Match:
    """chunks: those to go on from. shared: tokens of the longest beginning known, which may have no snapshot."""

    chunks: tuple[CachedChunk, ...] = ()
    shared: int = 0

    @property
    def blocks(self) -> list[int]:
        return [chunk.block for chunk in self.chunks]

    @property
    def snapshot(self) -> int | None:
        return self.chunks[-1].snapshot if self.chunks else None


class PrefixCache:
    """snapshots: how many there is memory for; None for a policy without lightning layers, which needs none."""

    def __init__(self, blocks: BlockPool, snapshots: int | None, chunk_size: int) -> None:
        self.needs_snapshots, self.chunk_size = snapshots is not None, chunk_size
        self.seen_tokens, self.hit_tokens = 0, 0
        self._blocks, self._serials = blocks, count()
        self._chunks: dict[Key, CachedChunk] = {}
        self._by_block: dict[int, CachedChunk] = {}
        self._free_snapshots = list(range(snapshots or 0))
        self._snapshots: OrderedDict[int, CachedChunk] = OrderedDict()  # longest unused first
        blocks.on_reuse = self._forget

    @property
    def hit_rate(self) -> float:
        """Share of the tokens of admitted sequences that were not computed again."""
        return self.hit_tokens / max(1, self.seen_tokens)

    def match(self, ids: np.ndarray, policy_version: int) -> Match:
        """The longest beginning of `ids` to go on from; at least one token is left to compute."""
        known: list[CachedChunk] = []
        for begin in range(0, len(ids) - self.chunk_size, self.chunk_size):
            chunk = self._chunks.get(self._key(ids, begin, known, policy_version))
            if chunk is None:
                break
            known.append(chunk)
        shared = len(known) * self.chunk_size
        while self.needs_snapshots and known and known[-1].snapshot is None:
            known.pop()
        return Match(tuple(known), shared)

    def use(self, match: Match, num_tokens: int) -> None:
        """A sequence of num_tokens goes on from a match."""
        self._blocks.hold(match.blocks)
        if match.snapshot is not None:
            self._snapshots.move_to_end(match.snapshot)
        self.seen_tokens += num_tokens
        self.hit_tokens += len(match.chunks) * self.chunk_size

    def insert(
        self, ids: np.ndarray, blocks: np.ndarray, policy_version: int, routes: np.ndarray | None = None
    ) -> int | None:
        """Keeps the chunks of `ids`, all full and computed. Returns the snapshot to fill with the state at their end,
        None where there is one or none is needed."""
        known: list[CachedChunk] = []
        for begin, block in zip(range(0, len(ids), self.chunk_size), blocks.tolist(), strict=False):
            key = self._key(ids, begin, known, policy_version)
            if key not in self._chunks:
                if block in self._by_block:  # behind chunks that are forgotten
                    self._forget(block)
                self._chunks[key] = self._by_block[block] = CachedChunk(
                    key, next(self._serials), block, None if routes is None else routes[begin:][: self.chunk_size]
                )
                self._blocks.cached.add(block)
            known.append(self._chunks[key])
        return self._take_snapshot(known[-1]) if self.needs_snapshots and known[-1].snapshot is None else None

    def clear(self) -> None:
        """Nothing that was computed so far is read again."""
        self._free_snapshots += list(self._snapshots)
        for content in (self._chunks, self._by_block, self._snapshots):
            content.clear()
        self._blocks.forget_cached()

    def _key(self, ids: np.ndarray, begin: int, known: list[CachedChunk], policy_version: int) -> Key:
        before = known[-1].serial if known else -1
        return policy_version, before, ids[begin : begin + self.chunk_size].astype(np.int64).tobytes()

    def _take_snapshot(self, chunk: CachedChunk) -> int:
        if self._free_snapshots:
            chunk.snapshot = self._free_snapshots.pop()
        else:
            chunk.snapshot, oldest = self._snapshots.popitem(last=False)
            oldest.snapshot = None
        self._snapshots[chunk.snapshot] = chunk
        return chunk.snapshot

    def _forget(self, block: int) -> None:
        chunk = self._by_block.pop(block)
        del self._chunks[chunk.key]
        if chunk.snapshot is not None:
            del self._snapshots[chunk.snapshot]
            self._free_snapshots.append(chunk.snapshot)
