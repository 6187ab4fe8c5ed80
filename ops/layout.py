"""How a batch of sequences is cut into chunk tiles: the one description both attention operators and both sides share.

A batch is packed: the T new tokens of S sequences lie one sequence after another. Sequence s contributes positions
starts[s] .. starts[s] + lengths[s] - 1 of itself; training has every start at 0, decode has every length at 1, chunked
prefill has anything between. Positions are cut at multiples of the chunk length C counted from position 0 of the
sequence (design A3, A4), whatever the batch, so a token always sits in the same row of the same tile.

Tiles are numbered rank-major: first the first tile each sequence touches, then the second of those that have one, and
so on, sequences with most tiles first. A scan over chunks is then a walk over contiguous slices.

Letters: S sequences, T tokens, N tiles, C chunk length.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TileTables:
    """The layout as kernels read it: int32, on the device."""

    begins: Tensor  # [S] place of each sequence's first new token in the packed batch
    lengths: Tensor  # [S] new tokens of each sequence
    starts: Tensor  # [S] position of its first new token
    tile_sequence: Tensor  # [N]
    tile_chunk: Tensor  # [N] chunk index inside the sequence, from position 0
    sequence_tiles: Tensor  # [S, ranks] tile numbers, -1 where a sequence has none


@dataclass(frozen=True)
class ChunkLayout:
    """Index tensors (int64) of one batch; build it once per forward and pass it to every layer."""

    device: torch.device  # of the tokens; position_ids and tables are there, the rest serves the CPU path
    chunk_size: int
    lengths: np.ndarray  # [S] new tokens of each sequence
    starts: np.ndarray  # [S] position of its first new token
    position_ids: Tensor  # [T]
    token_slot: Tensor  # [T] tile * C + row of each token
    token_sequence: np.ndarray  # [T]
    ranks: tuple[tuple[int, int], ...]  # (first tile, count) of each rank
    sequence_tiles: np.ndarray  # [S, ranks] tile numbers, -1 where a sequence has none
    tile_sequence: np.ndarray  # [N]
    tile_chunk: np.ndarray  # [N] chunk index inside the sequence, from position 0

    @property
    def num_tokens(self) -> int:
        return len(self.position_ids)

    @property
    def num_tiles(self) -> int:
        return len(self.tile_chunk)

    @property
    def is_decode(self) -> bool:
        """True when every sequence brings one token, so that a tile has a single query row."""
        return self.num_tokens == len(self.lengths)

    @classmethod
    def build(
        cls,
        lengths: Sequence[int] | np.ndarray,
        chunk_size: int,
        starts: Sequence[int] | np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> "ChunkLayout":
        """lengths, starts: [S] ints, lengths >= 1. Raises ValueError for an empty batch or sequence."""
        n = np.asarray(lengths, dtype=np.int64)
        p0 = np.zeros_like(n) if starts is None else np.asarray(starts, dtype=np.int64)
        if len(n) == 0 or n.min() < 1:
            raise ValueError(f"sequence lengths {n.tolist()[:8]}: a batch needs sequences of at least one token")
        first_chunk, end = p0 // chunk_size, p0 + n
        tiles = (end - 1) // chunk_size - first_chunk + 1
        order = np.argsort(-tiles, kind="stable")
        rank_counts = (tiles[None] > np.arange(tiles.max())[:, None]).sum(1)
        rank_first = np.concatenate([[0], np.cumsum(rank_counts)])
        sequence_tiles = _sequence_tiles(order, tiles, rank_first)
        sequence = np.repeat(np.arange(len(n)), n)
        positions = np.arange(len(sequence)) - np.repeat(np.cumsum(n) - n - p0, n)
        tile = sequence_tiles[sequence, positions // chunk_size - first_chunk[sequence]]
        tile_sequence = np.concatenate([order[:count] for count in rank_counts])
        tile_rank = np.repeat(np.arange(len(rank_counts)), rank_counts)
        return cls(
            device=torch.device(device),
            chunk_size=chunk_size,
            lengths=n,
            starts=p0,
            position_ids=torch.from_numpy(positions).to(device),
            token_slot=torch.from_numpy(tile * chunk_size + positions % chunk_size),
            token_sequence=sequence,
            ranks=tuple(zip(rank_first[:-1].tolist(), rank_counts.tolist(), strict=True)),
            sequence_tiles=sequence_tiles,
            tile_sequence=tile_sequence,
            tile_chunk=first_chunk[tile_sequence] + tile_rank,
        )

    @cached_property
    def begins(self) -> np.ndarray:
        """[S] place of each sequence's first new token in the packed batch."""
        begins: np.ndarray = np.cumsum(self.lengths) - self.lengths
        return begins

    @cached_property
    def keys_seen(self) -> int:
        """Pairs of a new token and a token of its sequence up to it."""
        return int((self.position_ids + 1).sum())

    def move(self, positions: np.ndarray) -> None:
        """Puts the tokens of a decode layout at other positions, [S], in the memory that kernels of a recorded step
        read. What a GPU's host reads stays as it was built."""
        assert self.is_decode, "only sequences of one token keep their tiles wherever they are"
        starts, chunks = torch.from_numpy(positions), torch.from_numpy(positions // self.chunk_size)
        self.position_ids.copy_(starts)
        if self.device.type == "cpu":
            self.starts[:], self.tile_chunk[:] = starts.numpy(), chunks.numpy()
        if self.device.type != "cpu" or "tables" in self.__dict__:  # which kernels of a GPU read, tested on a CPU
            self.tables.starts.copy_(starts)
            self.tables.tile_chunk.copy_(chunks)

    def planned(self, name: Hashable, source: object, build: Callable[[], Any]) -> Any:
        """What `build` makes of this layout and `source`, which must not change: once for all layers of a forward."""
        known = self._plans.get((name, id(source)))
        if known is None:
            known = self._plans[name, id(source)] = source, build()
        return known[1]

    @cached_property
    def _plans(self) -> dict[tuple[Hashable, int], tuple[object, Any]]:
        return {}

    @cached_property
    def tables(self) -> TileTables:
        parts = {
            "begins": self.begins,
            "lengths": self.lengths,
            "starts": self.starts,
            "tile_sequence": self.tile_sequence,
            "tile_chunk": self.tile_chunk,
            "sequence_tiles": self.sequence_tiles,
        }
        # One copy, in which every part begins at a multiple of 16 bytes: kernels are compiled for aligned pointers.
        sizes = [-(-part.size // 4) * 4 for part in parts.values()]
        padded = [np.resize(part.astype(np.int32), size) for part, size in zip(parts.values(), sizes, strict=True)]
        pieces = torch.from_numpy(np.concatenate(padded)).to(self.device).split(sizes)
        return TileTables(**{n: x[: parts[n].size].view(parts[n].shape) for n, x in zip(parts, pieces, strict=True)})

    def last_tokens(self) -> Tensor:
        """[S] index of each sequence's last new token in the packed batch."""
        return torch.from_numpy(np.cumsum(self.lengths) - 1).to(self.device)

    def into_tiles(self, x: Tensor) -> Tensor:
        """[T, H, d] tokens to [N, H, C, d] tiles; rows without a new token are zero."""
        heads, dim = x.shape[1:]
        flat = x.new_zeros(self.num_tiles * self.chunk_size, heads * dim)
        flat.index_copy_(0, self.token_slot, x.reshape(-1, heads * dim))
        return flat.view(self.num_tiles, self.chunk_size, heads, dim).transpose(1, 2).contiguous()

    def from_tiles(self, tiles: Tensor) -> Tensor:
        """[N, H, C, d] tiles back to [T, H, d] tokens."""
        _, heads, _, dim = tiles.shape
        flat = tiles.transpose(1, 2).reshape(-1, heads * dim)
        return flat.index_select(0, self.token_slot).view(-1, heads, dim)


def _sequence_tiles(order: np.ndarray, tiles: np.ndarray, rank_first: np.ndarray) -> np.ndarray:
    scan_position = np.empty_like(order)
    scan_position[order] = np.arange(len(order))
    table = rank_first[:-1][None] + scan_position[:, None]
    return np.where(np.arange(len(rank_first) - 1)[None] < tiles[:, None], table, -1)
