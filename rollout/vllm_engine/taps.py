"""Where vLLM shows the routes of a step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.v1.kv_cache_interface import FullAttentionSpec

from rollout.routes import RouteType
from rollout.vllm_engine.routes import Chosen, RouteRecorder


def recorder(runner: Any, route_type: RouteType, read: Callable[[], Chosen]) -> RouteRecorder:
    groups = runner.kv_cache_config.kv_cache_groups
    softmax = [place for place, group in enumerate(groups) if isinstance(group.kv_cache_spec, FullAttentionSpec)]
    return RouteRecorder(runner, route_type, read, softmax[0])  # the last layer of a policy is one


class RouterTaps:
    """What the routers of vLLM's own mixtures chose in the last forward. Raises ValueError where kernels route
    themselves."""

    def __init__(self, model: Any) -> None:
        mixtures = sorted((each for each in model.modules() if isinstance(each, MoERunner)), key=lambda m: m.layer_id)
        self._passed: list[Chosen | None] = [None] * len(mixtures)
        for place, mixture in enumerate(mixtures):
            if mixture.routed_experts.quant_method.is_monolithic:
                raise ValueError(
                    "rollout.routing_replay: vLLM's kernel for experts chooses them itself, out of sight; set it to "
                    "none, or rollout.vllm_aligned=true"
                )
            mixture.router.select_experts = partial(self._pass_on, place, mixture.router.select_experts)

    def read(self) -> Chosen:
        passed = [each for each in self._passed if each is not None]
        assert len(passed) == len(self._passed), "a mixture was passed by"
        self._passed = [None] * len(passed)
        experts, weights = zip(*passed, strict=True)
        return torch.stack(experts, dim=1), torch.stack(weights, dim=1).float()

    def _pass_on(self, place: int, select: Callable[..., Chosen], *arguments: Any, **named: Any) -> Chosen:
        weights, experts = select(*arguments, **named)
        self._passed[place] = experts, weights
        return weights, experts
