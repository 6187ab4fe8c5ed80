"""CUDA graphs for decode: the kernels of one step recorded once for each padded batch size, then replayed.

Launching some hundred kernels from Python takes longer than the kernels of a small batch. A recorded step reads its
arguments from buffers that keep their addresses: they are filled before every replay. Rows beyond the batch belong to a
slot and a block that no sequence owns. As no row's bits depend on other rows (design A1), neither padding nor replay
changes one. Weights are read where they lie, and new ones are copied into the same memory, so a recording outlives
them; not so those in FP8, which are quantised into new memory.
"""

import bisect

import numpy as np
import torch
from torch import Tensor

import ops
from policy.cache import CachePools, CacheView
from policy.transformer import Policy

LARGEST_STEP = 32  # rows between two padded sizes, from there on


def padded_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, 8, 16, 32, 64, 96, ... up to the first that holds max_batch rows."""
    sizes = [1]
    while sizes[-1] < max_batch:
        sizes.append(sizes[-1] + min(sizes[-1], LARGEST_STEP))
    return sizes


class DecodeGraphs:
    """Runs decode steps of `policy` over `pools`, whose last slot and last block nobody else may own.

    table_width: blocks of the longest sequence. capture: record and replay; without it the same buffers go through the
    policy step by step, which is what a machine without a GPU can test.
    """

    def __init__(
        self, policy: Policy, pools: CachePools, spare_slot: int, spare_block: int, max_batch: int, table_width: int,
        capture: bool,
    ) -> None:  # fmt: skip
        self.policy, self.pools, self.capture = policy, pools, capture
        self.spare_slot, self.spare_block, self.table_width = spare_slot, spare_block, table_width
        self.sizes = padded_sizes(max_batch)
        self._steps: dict[int, _Step] = {}
        self._memory = torch.cuda.graph_pool_handle() if capture else None

    def run(self, ids: np.ndarray, slots: np.ndarray, block_table: np.ndarray, positions: np.ndarray) -> Tensor:
        """One token of each sequence: ids, slots, positions int64 [B], block_table int64 [B, <= table_width] -> hidden
        FP32 [B, D], valid until the next call."""
        size = self.sizes[bisect.bisect_left(self.sizes, len(ids))]
        if size not in self._steps:
            self._steps[size] = _Step(self, size)
            if self.capture:
                self._steps[size].record()
        step = self._steps[size]
        step.fill(ids, slots, block_table, positions)
        return step.forward()[: len(ids)]


class _Step:
    """The buffers of one padded size, and what was recorded over them."""

    def __init__(self, graphs: DecodeGraphs, size: int) -> None:
        self.graphs, self.size = graphs, size
        policy, width = graphs.policy, graphs.table_width
        chunk, device = policy.config.chunk_size, policy.device
        # As if every sequence were the longest: a kernel's grid must cover the segments of any that comes.
        self.layout = ops.ChunkLayout.build([1] * size, chunk, [width * chunk - 1] * size, device)
        self.ids = torch.zeros(size, dtype=torch.int64, device=device)
        self.slots = torch.zeros(size, dtype=torch.int64, device=device)
        self.table = torch.zeros(size, width, dtype=torch.int64, device=device)
        self.hidden: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def fill(self, ids: np.ndarray, slots: np.ndarray, block_table: np.ndarray, positions: np.ndarray) -> None:
        size, graphs, tables = self.size, self.graphs, self.layout.tables
        chunk = self.layout.chunk_size
        _put(self.ids, ids, 0)
        _put(self.slots, slots, graphs.spare_slot)
        _put(self.layout.position_ids, positions, 0)
        _put(tables.starts, positions, 0)
        _put(tables.tile_chunk, positions // chunk, 0)
        table = np.full((size, graphs.table_width), graphs.spare_block, dtype=np.int64)
        table[: len(block_table), : block_table.shape[1]] = block_table
        _put(self.table, table, 0)

    def forward(self) -> Tensor:
        if self.graph is None or self.hidden is None:
            return self._compute()
        self.graph.replay()
        return self.hidden

    def _compute(self) -> Tensor:
        view = CacheView(self.graphs.pools, self.slots, self.table)
        hidden: Tensor = self.graphs.policy(self.ids, self.layout, view)
        return hidden

    def record(self) -> None:
        """A first run compiles the kernels. Only spare rows take part in it: a state would advance twice."""
        none = np.zeros(0, dtype=np.int64)
        self.fill(none, none, none.reshape(0, 0), none)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.graphs._memory):
            self.hidden = self._compute()


def _put(buffer: Tensor, values: np.ndarray, padding: int) -> None:
    """Fills a buffer from the front; the rest of its rows get the padding."""
    rows = np.full(tuple(buffer.shape), padding, dtype=np.int64)
    rows[: len(values)] = values
    buffer.copy_(torch.from_numpy(rows))
