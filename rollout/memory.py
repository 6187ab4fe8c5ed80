"""Ownership of cache memory: state slots, and key-value blocks that sequences share by reference count."""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class SlotPool:
    """The lowest free slot is taken first, so that those in use lie side by side."""

    def __init__(self, size: int) -> None:
        self._free = list(range(size))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        assert count <= len(self._free), f"{count} slots asked, {len(self._free)} free"
        return [heapq.heappop(self._free) for _ in range(count)]

    def give_back(self, slot: int) -> None:
        assert slot not in self._free, f"slot {slot} given back twice"
        heapq.heappush(self._free, slot)


class BlockPool:
    """Blocks that nobody holds are taken again: first the lowest of those with nothing worth keeping in them, so that
    sequences that grow together get neighbours, which a CPU reads without a copy; then the cached ones, longest unused
    first. A cached block can be held again until its turn comes."""

    def __init__(self, size: int) -> None:
        self.cached: set[int] = set()
        self.on_reuse: Callable[[int], None] = self.cached.discard  # told of a cached block that is taken again
        self._empty = list(range(size))
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached ones
        self._references = [0] * size

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._idle)

    def num_idle(self, blocks: Iterable[int]) -> int:
        """Those of `blocks` that nobody holds."""
        return sum(self._references[block] == 0 for block in blocks)

    def take(self, count: int) -> list[int]:
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        return [self._take_one() for _ in range(count)]

    def hold(self, blocks: Sequence[int], times: int = 1) -> None:
        """Further owners of each: it must have one already, or be cached."""
        for block in blocks:
            assert self._references[block] > 0 or block in self.cached, f"block {block} is held but has no content"
            self._references[block] += times
            if times:
                self._idle.pop(block, None)

    def give_back(self, blocks: Sequence[int]) -> None:
        """blocks: in order of position, so that of a cached prefix the end is taken again first."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} given back twice"
            if self._references[block] == 0:
                if block in self.cached:
                    self._idle[block] = None
                else:
                    heapq.heappush(self._empty, block)

    def forget_cached(self) -> None:
        """The content of no block is worth keeping any more."""
        self._empty = sorted([*self._empty, *self._idle])
        self._idle.clear()
        self.cached.clear()

    def _take_one(self) -> int:
        if self._empty:
            block = heapq.heappop(self._empty)
        else:
            block, _ = self._idle.popitem(last=False)
            self.cached.discard(block)
            self.on_reuse(block)
        self._references[block] = 1
        return block
