"""Routing replay from a real vLLM with kernels of its own: what it recorded is what it computed, and it helps."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rollout.request import Completion, Request
from rollout.vllm_engine.engine import VllmEngine
from tests.rollout.vllm_engine.test_engine import at_step
from tests.rollout.vllm_engine.tiny import (
    LONG,
    experts_used,
    mean_difference,
    open_engine,
    ordered_routes,
    own_routes,
    policy_of,
    replaying,
    request,
    watch,
    weights,
)

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
# In FP32 both sides sum some hundred products in other orders. Measured: 0.2e-5; another token's weights: 0.1 and more.
WEIGHT_ERROR = 2e-5


def open_moe(family: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **rollout: Any) -> VllmEngine:
    engine = open_engine(family, dtype, **{"routing_replay": "weights", **rollout})
    engine.load_weights(weights(family, 0, dtype), 0)
    return engine


def assert_recorded(asked: list[Request], completions: list[Completion], family: str, version: int = 0) -> None:
    """Every position, with the routes that a whole forward takes."""
    for each in completions:
        experts, expert_weights = ordered_routes(each)
        own_experts, own_weights = own_routes(policy_of(family, version), asked[each.request_id], each)
        assert np.array_equal(experts, own_experts)
        assert np.abs(expert_weights - own_weights).max() < WEIGHT_ERROR


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe_mixed"])
def test_every_position_is_recorded_with_prompts_shared_and_memory_short(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = watch(monkeypatch, Scheduler, "_preempt_request")
    known = watch(monkeypatch, KVCacheManager, "get_computed_blocks")
    engine = open_moe(family, memory_mb=2)
    asked = [request(0, LONG, 3), request(1, 30, 6, max_new_tokens=150, min_new_tokens=150), request(2, 1)]
    assert_recorded(asked, engine.generate(asked), family)
    assert_recorded(asked, engine.generate(asked), family)
    assert preempted and 128 in {tokens for _, tokens, *_ in known}
    assert not engine._sampler.routes._pieces and not engine._sampler.routes._next


def test_after_new_weights_routes_are_theirs() -> None:
    """Greedy samples stand at position 128 when the weights come: the second goes on there from the block that the
    first computes anew."""
    engine = open_moe()
    asked = [request(0, 100, 2, temperature=0.0, max_new_tokens=40, min_new_tokens=40)]
    patch = at_step(engine, 29, lambda: engine.load_weights(weights("qwen3_moe", 1), 1))
    completions = engine.generate(asked)
    patch.undo()
    assert completions[0].policy_versions.tolist() == [0] * 29 + [1] * 11
    assert completions[0].token_ids[:29].tolist() == completions[1].token_ids[:29].tolist()
    assert_recorded(asked, completions, "qwen3_moe", version=1)


def test_samples_that_are_asked_again_or_aborted_leave_nothing_behind() -> None:
    engine = open_moe(on_new_weights="continue", max_batch=2)
    asked = [request(0, 30, 4, max_new_tokens=20, min_new_tokens=20), request(1, 30, 2)]

    def change() -> None:
        engine.load_weights(weights("qwen3_moe", 1), 1)
        engine.abort(1)

    patch = at_step(engine, 5, change)
    completions = engine.generate(asked)
    patch.undo()
    assert_recorded(asked, [each for each in completions[:4] if (each.policy_versions == 1).all()], "qwen3_moe", 1)
    assert not engine._sampler.routes._pieces
    assert all(len(each.routed_experts) == 30 + len(each.token_ids) - 1 for each in completions[:4])


def test_in_bf16_the_trainer_goes_the_engines_ways_and_the_mismatch_falls() -> None:
    """Measured for three seeds: mean 0.030, 0.039, 0.037 without; 0.68, 0.56, 0.62 of that with experts; of what is
    left 0.89, 0.83, 0.84 with weights."""
    engine = open_moe(dtype=torch.bfloat16)
    asked = [request(index, 5 + 12 * index, 4, min_new_tokens=24) for index in range(16)]
    completions, policy = engine.generate(asked), policy_of("qwen3_moe", 0, torch.bfloat16)
    differing = 0
    for each in completions[::8]:
        recorded, _ = ordered_routes(each)
        used = experts_used(policy, replaying(asked[each.request_id], each, "experts"))
        assert np.array_equal(used, recorded)
        differing += int((experts_used(policy, replaying(asked[each.request_id], each, "none")) != recorded).sum())
    assert differing > 0
    plain, experts, both = (
        mean_difference(policy, asked, completions, replay) for replay in ("none", "experts", "weights")
    )
    print(f"vLLM, BF16: mean |difference| {plain:.4f}, with experts {experts:.4f}, with weights {both:.4f}")
    assert experts < 0.85 * plain
    assert both < 0.95 * experts


def test_without_weights_only_experts_are_kept() -> None:
    engine = open_moe(routing_replay="experts")
    (completion,) = engine.generate([request(0, 20)])
    assert completion.routed_experts is not None and completion.routed_weights is None


def test_what_cannot_be_recorded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"routing_replay = weights: the policy has no mixture of experts"):
        open_engine("qwen3", routing_replay="weights")
    from rollout.vllm_engine import taps

    class Mixture:
        layer_id, routed_experts = 0, SimpleNamespace(quant_method=SimpleNamespace(is_monolithic=True))

    class Model:
        def modules(self) -> Iterator[Any]:
            yield Mixture()

    monkeypatch.setattr(taps, "MoERunner", Mixture)
    with pytest.raises(ValueError, match=r"chooses them itself.* or rollout\.vllm_aligned=true"):
        taps.RouterTaps(Model())
