"""Which experts the tokens of a forward go to, and with what weights: recorded in engines, replayed in the trainer.

Where trainer and engine do not agree in every bit, a router whose scores are close sends a token to other experts on
the two sides. Routing replay (R3, 2510.11370) uses the engine's choice in the trainer's forward. There the weights of
the experts are the trainer's own, so that the gradient reaches the router. Here they may be the engine's too, and the
gradient goes straight through them to the trainer's.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNKNOWN = -1  # in place of each expert of a token, where nobody recorded them; the weights are then NaN


class Routing:
    """For one call of `Policy.forward`.

    experts: int [T, mixture layers, k], those to use, or None to let the router decide. In a layer of a token they are
    k different ones, in any order, or all UNKNOWN, which leaves the choice to the router. weights: FP32 of the same
    shape and order, those to use, NaN where the experts are UNKNOWN; None leaves all of them to the router.
    """

    def __init__(self, experts: Tensor | None = None, weights: Tensor | None = None) -> None:
        assert weights is None or (experts is not None and weights.shape == experts.shape)
        self._experts, self._weights = experts, weights
        self._chosen: list[Tensor] = []
        self._weighed: list[Tensor] = []

    def meet(self, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Called by each mixture layer in turn with its router's choice, int64 and FP32 [T, k]; returns the experts to
        use instead, ascending, and the weights recorded for them, if any."""
        layer = len(self._chosen)
        self._chosen.append(chosen)
        if self._experts is None:
            self._weighed.append(weights.detach())
            return None
        given = self._experts[:, layer].long()
        experts, order = torch.where(given == UNKNOWN, chosen, given).sort(dim=-1)
        return experts, None if self._weights is None else self._weights[:, layer].gather(1, order)

    def chosen(self) -> Tensor:
        """What the routers chose, int16 [T, mixture layers, k], ascending; call it after the forward."""
        return torch.stack(self._chosen, dim=1).to(torch.int16)

    def weights(self) -> Tensor:
        """The weights of what they chose, FP32, shaped alike; of a forward that replayed nothing."""
        return torch.stack(self._weighed, dim=1)
