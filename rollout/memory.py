"""Ownership of cache memory: state slots, and key-value blocks that the samples of a group share by reference count."""


class SlotPool:
    def __init__(self, size: int) -> None:
        self._free = list(range(size - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        assert count <= len(self._free), f"{count} slots asked, {len(self._free)} free"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, slot: int) -> None:
        assert slot not in self._free, f"slot {slot} given back twice"
        self._free.append(slot)


class BlockPool:
    def __init__(self, size: int) -> None:
        self._free = list(range(size - 1, -1, -1))
        self._references = [0] * size

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        assert count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: list[int], times: int) -> None:
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is shared but nobody owns it"
            self._references[block] += times

    def give_back(self, blocks: list[int]) -> None:
        for block in blocks:
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} given back twice"
            if self._references[block] == 0:
                self._free.append(block)
