"""Routes of the tokens that vLLM computes, put together by request.

vLLM 0.32 returns experts itself (enable_return_routed_experts), but only from its second model runner, which no CPU has
and whose sampler is another, and never their weights. So both are taken where routers hand them on.

What a request finds in vLLM's prefix cache was computed for an earlier one. So routes are also kept by the place of a
token's keys and values in vLLM's memory: whoever reads those went the ways that stand there.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from rollout.routes import RouteType

Chosen = tuple[Tensor, Tensor]  # experts, integers, and weights, FP32: [T or more, mixture layers, k]


class RouteRecorder:
    """runner: the model runner, whose input batch knows the requests of a step. read: what the forward of a step chose,
    token by token in the order of that batch. group: of the runner's block tables, one of softmax layers."""

    def __init__(self, runner: Any, route_type: RouteType, read: Callable[[], Chosen], group: int) -> None:
        self.runner, self.type, self.read, self.group = runner, route_type, read, group
        self._by_slot = route_type.unknown(0)
        self._pieces: dict[str, list[tuple[int, np.ndarray]]] = {}  # by vLLM's id: first position and routes from there
        self._next: dict[str, int] = {}  # position after the last piece

    def record(self) -> None:
        """Of the forward that the runner has just made."""
        names = self.runner.input_batch.req_ids
        bounds = self.runner.query_start_loc.np[: len(names) + 1].tolist()
        positions = self.runner.positions[: bounds[-1]].cpu().numpy()
        experts, weights = self.read()
        routes = self.type.of(experts[: bounds[-1]], weights[: bounds[-1]])
        self._keep(self._slots(np.repeat(np.arange(len(names)), np.diff(bounds)), positions), routes)
        for row, (name, (begin, end)) in enumerate(zip(names, pairwise(bounds), strict=True)):
            start = int(positions[begin])
            pieces = self._pieces.setdefault(name, [])
            if start != self._next.get(name, 0):
                pieces.append((0, self._by_slot[self._slots(np.full(start, row), np.arange(start))]))
            pieces.append((start, routes[begin:end]))
            self._next[name] = start + end - begin

    def take(self, name: str, tokens: int) -> np.ndarray:
        """Routes of the first tokens of a request, which is forgotten."""
        routes = self.type.unknown(tokens)
        for start, piece in self._pieces.pop(name, []):
            routes[start : start + len(piece)] = piece[: max(0, tokens - start)]
        self._next.pop(name, None)
        return routes

    def forget_places(self) -> None:
        """What running requests go on from may now have been computed anew, by any of them."""
        self._next.clear()

    def _keep(self, slots: np.ndarray, routes: np.ndarray) -> None:
        missing = int(slots.max()) + 1 - len(self._by_slot)
        if missing > 0:
            more = self.type.unknown(max(missing, len(self._by_slot)))
            self._by_slot = np.concatenate([self._by_slot, more])
        self._by_slot[slots] = routes

    def _slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 [N]: places in vLLM's memory, of positions [N] of the requests in rows [N] of the input batch."""
        table = self.runner.input_batch.block_table[self.group]
        blocks, offsets = np.divmod(positions, table.block_size)
        slots: np.ndarray = table.get_numpy_array()[rows, blocks].astype(np.int64) * table.block_size + offsets
        return slots
