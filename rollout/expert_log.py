"""The routes that every token of the running samples took, for the trainer to replay."""

import numpy as np

from ops import ChunkLayout
from policy.config import PolicyConfig
from policy.routing import Routing
from rollout.config import RolloutConfig
from rollout.routes import RouteType


class ExpertLog:
    """One row of routes for each slot and position; it grows with the longest sequence. Raises ValueError without
    mixtures."""

    def __init__(self, config: PolicyConfig, rollout: RolloutConfig) -> None:
        self.type = RouteType(config, rollout)
        self._routes = self.type.unknown(rollout.max_batch, 0)

    def write(self, slots: np.ndarray, layout: ChunkLayout, routing: Routing) -> None:
        """Of one forward. slots: [S], of each sequence of the layout."""
        positions = layout.position_ids.cpu().numpy()
        self._widen(int(positions.max()) + 1)
        routes = self.type.of(routing.chosen(), routing.weights())
        self._routes[np.repeat(slots, layout.lengths), positions] = routes

    def put(self, slot: int, routes: np.ndarray) -> None:
        """The first tokens of the slot: a prefix computed by another sequence."""
        self._widen(len(routes))
        self._routes[slot, : len(routes)] = routes

    def rows(self, slot: int, tokens: int) -> np.ndarray:
        """Routes of the first tokens of the slot."""
        return self._routes[slot, :tokens].copy()

    def fork(self, slot: int, others: list[int]) -> None:
        """The samples of a group begin with the prompt that was computed in the first one's slot."""
        self._routes[others] = self._routes[slot]

    def take(self, slot: int, tokens: int) -> np.ndarray:
        """Routes of the first tokens of the slot, which is as new afterwards."""
        taken = self.type.unknown(tokens)
        kept = self._routes[slot, :tokens]
        taken[: len(kept)] = kept
        self._routes[slot] = self.type.unknown()
        return taken

    def _widen(self, tokens: int) -> None:
        slots, held = self._routes.shape[:2]
        if tokens > held:
            more = self.type.unknown(slots, max(tokens - held, held))
            self._routes = np.concatenate([self._routes, more], axis=1)
