"""The experts that every token of the running samples was sent to, for the trainer to replay."""

import numpy as np
from torch import Tensor

from ops import ChunkLayout
from policy.config import PolicyConfig
from policy.routing import UNKNOWN


class ExpertLog:
    """One row for each slot and position; it grows with the longest sequence. Raises ValueError without mixtures."""

    def __init__(self, slots: int, config: PolicyConfig) -> None:
        layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
        if not layers:
            raise ValueError("rollout.routing_replay = True: the policy has no mixture of experts; leave it off")
        self._experts = np.full((slots, 0, layers, config.num_experts_per_tok), UNKNOWN, dtype=np.int16)

    def write(self, slots: np.ndarray, layout: ChunkLayout, chosen: Tensor) -> None:
        """Of one forward. slots: [S], of each sequence of the layout; chosen: int16 [T, layers, k]."""
        positions = layout.position_ids.cpu().numpy()
        self._widen(int(positions.max()) + 1)
        self._experts[np.repeat(slots, layout.lengths), positions] = chosen.cpu().numpy()

    def put(self, slot: int, experts: np.ndarray) -> None:
        """The first tokens of the slot, int16 [tokens, layers, k]: a prefix computed by another sequence."""
        self._widen(len(experts))
        self._experts[slot, : len(experts)] = experts

    def rows(self, slot: int, tokens: int) -> np.ndarray:
        """int16 [tokens, layers, k] of the first tokens of the slot."""
        return self._experts[slot, :tokens].copy()

    def fork(self, slot: int, others: list[int]) -> None:
        """The samples of a group begin with the prompt that was computed in the first one's slot."""
        self._experts[others] = self._experts[slot]

    def take(self, slot: int, tokens: int) -> np.ndarray:
        """int16 [tokens, layers, k] of the first tokens of the slot, which is as new afterwards."""
        taken = np.full((tokens, *self._experts.shape[2:]), UNKNOWN, dtype=np.int16)
        kept = self._experts[slot, :tokens]
        taken[: len(kept)] = kept
        self._experts[slot] = UNKNOWN
        return taken

    def _widen(self, tokens: int) -> None:
        missing = tokens - self._experts.shape[1]
        if missing > 0:
            room = max(missing, self._experts.shape[1])
            self._experts = np.pad(self._experts, ((0, 0), (0, room), (0, 0), (0, 0)), constant_values=UNKNOWN)
