"""Recorded decode steps: the kernels of one step for each padded batch size, replayed as a CUDA graph or, on a CPU, as
a list of calls (`ops.Recording`).

Calling some hundred kernels from Python takes longer than the kernels of a small batch. A recorded step reads its
arguments from buffers that keep their addresses: they are filled before every replay. Rows beyond the batch belong to a
slot and a block that no sequence owns. As no row's bits depend on other rows (design A1), neither padding nor replay
changes one. Weights are read where they lie, and new ones are copied into the same memory; what is made of them, FP8
and the matrices that a CPU packs, goes to new memory, so such a recording lasts for one version of them.
"""

import bisect
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

import ops
from policy.cache import CachePools, CacheView
from policy.transformer import Policy

LARGEST_STEP = 32  # rows between two padded sizes, from there on
CPU_STEP = 8  # rows that a CPU's product takes together
# Sizes come and go with every version of the weights. A recording takes as much longer than a plain step as some four
# replays save (3 to 6, by policy and batch); what it reads that is made of the weights is there by then.
PLAIN_STEPS = 4
CPU_STEPS_KEPT = 4  # recordings; each has memory of its own for all that lies between its kernels


def padded_sizes(max_batch: int, step: int = 0) -> list[int]:
    """1, 2, 4, 8, 16, 32, 64, 96, ... or multiples of `step`, up to the first that holds max_batch rows."""
    sizes = [step or 1]
    while sizes[-1] < max_batch:
        sizes.append(sizes[-1] + (step or min(sizes[-1], LARGEST_STEP)))
    return sizes


class DecodeGraphs:
    """Runs decode steps of `policy` over `pools`, whose last slot and last block nobody else may own.

    table_width: blocks of the longest sequence. capture: record and replay; without it the same buffers go through the
    policy step by step, which is what a machine without a GPU can test of its kernels.
    """

    def __init__(
        self, policy: Policy, pools: CachePools, spare_slot: int, spare_block: int, max_batch: int, table_width: int,
        capture: bool,
    ) -> None:  # fmt: skip
        self.policy, self.pools, self.capture = policy, pools, capture
        self.spare_slot, self.spare_block, self.table_width = spare_slot, spare_block, table_width
        self._on_cpu = policy.device.type == "cpu"
        self.sizes = padded_sizes(max_batch, CPU_STEP if capture and self._on_cpu else 0)
        self._steps: dict[int, _Step] = {}  # the one used last at the end
        self._parameters = list(policy.parameters())
        self._weights = self._versions()
        self._memory = torch.cuda.graph_pool_handle() if capture and not self._on_cpu else None

    def run(self, ids: np.ndarray, slots: np.ndarray, block_table: np.ndarray, positions: np.ndarray) -> Tensor:
        """One token of each sequence: ids, slots, positions int64 [B], block_table int64 [B, <= table_width] -> hidden
        FP32 [B, D], valid until the next call."""
        if (versions := self._versions()) != self._weights:
            self._steps.clear()
            self._weights = versions
        size = self.sizes[bisect.bisect_left(self.sizes, len(ids))]
        step = self._steps.pop(size, None)
        if step is None:
            if self._on_cpu and len(self._steps) == CPU_STEPS_KEPT:
                del self._steps[next(iter(self._steps))]
            step = _Step(self, size)
            if self.capture and not self._on_cpu:
                step.capture()
        self._steps[size] = step
        step.fill(ids, slots, block_table, positions)
        return step.forward()[: len(ids)]

    def _versions(self) -> list[int]:
        """How often the weights changed from which recorded steps read something made. They stay where they are."""
        if not (self._on_cpu or self.policy.config.fp8_linear):
            return []
        return [*map(attrgetter("_version"), self._parameters)]


class _Step:
    """The buffers of one padded size, and what was recorded over them."""

    def __init__(self, graphs: DecodeGraphs, size: int) -> None:
        self.graphs, self.size = graphs, size
        policy, width = graphs.policy, graphs.table_width
        chunk, device = policy.config.chunk_size, policy.device
        # As if every sequence were the longest: a kernel's grid, or its threads, must do for any that comes.
        self.layout = ops.ChunkLayout.build([1] * size, chunk, [width * chunk - 1] * size, device)
        assert self.layout.keys_seen  # counted now, before they move
        self.ids, self.slots = _Buffer((size,), 0, device), _Buffer((size,), graphs.spare_slot, device)
        self.table = _Buffer((size, width), graphs.spare_block, device)
        self.positions = np.zeros(size, dtype=np.int64)
        self.hidden: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | ops.Recording | None = None
        self.plain = 0  # steps so far that were not replayed

    def fill(self, ids: np.ndarray, slots: np.ndarray, block_table: np.ndarray, positions: np.ndarray) -> None:
        self.ids.put(ids)
        self.slots.put(slots)
        self.table.put(block_table)
        self.positions[: len(positions)], self.positions[len(positions) :] = positions, 0
        self.layout.move(self.positions)

    def forward(self) -> Tensor:
        """On a CPU a size is recorded while it computes, when it has come up so often that it will pay."""
        if self.graph is not None and self.hidden is not None:
            self.graph.replay()
            return self.hidden
        self.plain += 1
        if not self.graphs.capture or self.plain <= PLAIN_STEPS:
            return self._compute()
        self.graph = ops.Recording(self._compute)
        self.hidden = self.graph.result
        return self.hidden

    def _compute(self) -> Tensor:
        view = CacheView(self.graphs.pools, self.slots.tensor, self.table.tensor)
        hidden: Tensor = self.graphs.policy(self.ids.tensor, self.layout, view)
        return hidden

    def capture(self) -> None:
        """On a GPU. A first run compiles the kernels. Only spare rows take part in it: a state would advance twice."""
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


class _Buffer:
    """int64 memory on the device, and what is to go there on the host, one and the same on a CPU."""

    def __init__(self, shape: tuple[int, ...], padding: int, device: torch.device) -> None:
        self._padding, self._host = padding, torch.full(shape, padding)
        self.tensor = self._host.to(device)

    def put(self, values: np.ndarray) -> None:
        """Rows from the front; the first column of all others, which is all that is read of them, gets the padding."""
        host = self._host.numpy()
        if values.ndim == 1:
            host[: len(values)], host[len(values) :] = values, self._padding
        else:
            host[: len(values), : values.shape[1]], host[len(values) :, 0] = values, self._padding
        if self.tensor.device != self._host.device:
            self.tensor.copy_(self._host)
