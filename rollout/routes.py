"""Routes: the experts of a token in every mixture layer, and their weights, as engines record them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.config import PolicyConfig
from policy.routing import UNKNOWN
from rollout.config import RolloutConfig


class RouteType:
    """What is recorded of a token, as one array: [mixture layers, k] pairs of an expert, int16, and of its weight,
    float32, which rollout.routing_replay=experts leaves out.

    Raises ValueError when the policy has no mixture of experts.
    """

    def __init__(self, config: PolicyConfig, rollout: RolloutConfig) -> None:
        layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
        if not layers:
            raise ValueError(
                f"rollout.routing_replay = {rollout.routing_replay}: the policy has no mixture of experts; "
                "set it to none"
            )
        self.shape = layers, config.num_experts_per_tok
        self.with_weights = rollout.routing_replay == "weights"
        self.dtype = np.dtype([("expert", np.int16)] + [("weight", np.float32)] * self.with_weights)

    def unknown(self, *shape: int) -> np.ndarray:
        """Routes [*shape, layers, k] that nobody knows."""
        routes = np.empty((*shape, *self.shape), self.dtype)
        routes["expert"] = UNKNOWN
        if self.with_weights:
            routes["weight"] = np.nan
        return routes

    def of(self, experts: Tensor, weights: Tensor) -> np.ndarray:
        """experts: integers [T, layers, k]; weights: FP32 of the same shape -> routes of T tokens."""
        routes = self.unknown(len(experts))
        routes["expert"] = experts.to(torch.int16).cpu().numpy()
        if self.with_weights:
            routes["weight"] = weights.cpu().numpy()
        return routes


def completion_fields(routes: np.ndarray | None) -> dict[str, Any]:
    """Those of `Completion` that tell of a sequence's routes."""
    if routes is None:
        return {}
    return {f"routed_{name}s": np.ascontiguousarray(routes[name]) for name in routes.dtype.names or ()}
