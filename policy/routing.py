"""Which experts the tokens of one forward go to: recorded in the engine, replayed in the trainer.

Where trainer and engine do not agree in every bit, a router whose scores are close sends a token to other experts on
the two sides. Routing replay (R3, 2510.11370) uses the engine's choice in the trainer's forward. The weights of the
experts stay the trainer's own, so that the gradient still reaches the router.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNKNOWN = -1  # in place of each expert of a token, where nobody recorded them


class Routing:
    """For one call of `Policy.forward`.

    replayed: int [T, mixture layers, k], the experts to use, or None to let the router decide. In a layer of a token
    they are k different ones, in any order, or all UNKNOWN, which leaves the choice to the router.
    """

    def __init__(self, replayed: Tensor | None = None) -> None:
        self._replayed = replayed
        self._chosen: list[Tensor] = []

    def meet(self, chosen: Tensor) -> Tensor | None:
        """Called by each mixture layer in turn with its router's choice, int64 [T, k]; returns what to use instead."""
        layer = len(self._chosen)
        self._chosen.append(chosen)
        if self._replayed is None:
            return None
        given = self._replayed[:, layer].long()
        return torch.where(given == UNKNOWN, chosen, given).sort(dim=-1).values

    def chosen(self) -> Tensor:
        """What the routers chose, int16 [T, mixture layers, k], ascending; call it after the forward."""
        return torch.stack(self._chosen, dim=1).to(torch.int16)
