"""Routing replay from a real SGLang: what it recorded is what it computed, and it helps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from policy.checkpoint import dtype_name, save_config
from rollout.config import RolloutConfig
from rollout.request import Completion, Request
from rollout.sglang_engine.engine import SglangEngine
from tests.rollout.sglang_engine.test_real import python, running
from tests.rollout.vllm_engine.tiny import (
    LONG,
    config_of,
    experts_used,
    mean_difference,
    own_routes,
    policy_of,
    replaying,
    request,
    weights,
)

pytestmark = pytest.mark.sglang
FAMILY = "qwen3_moe"


@contextmanager
def serving(folder: Path, dtype: torch.dtype, **rollout: object) -> Iterator[SglangEngine]:
    settings = {"python": python(), "start_seconds": 300.0, "answer_seconds": 120.0}
    common = {"engine": "sglang", "max_batch": 16, "memory_mb": 32, "routing_replay": "experts", "sglang": settings}
    save_config(folder, config_of(FAMILY), dtype_name(dtype), None)
    chosen = RolloutConfig.model_validate({**common, **rollout})
    engine = SglangEngine(config_of(FAMILY), folder, dtype, chosen, torch.device("cpu"))
    engine.load_weights(weights(FAMILY, 0, dtype), 0)
    assert engine.server is not None
    try:
        yield engine
    finally:
        engine.server.stop()


def assert_recorded(asked: list[Request], completions: list[Completion], version: int) -> None:
    """Every position, with the experts that a whole forward takes."""
    for each in completions:
        assert each.routed_experts is not None
        own, _ = own_routes(policy_of(FAMILY, version), asked[each.request_id], each)
        assert np.array_equal(np.sort(each.routed_experts), own)


def test_every_position_is_recorded_with_prompts_shared_and_under_new_weights(tmp_path: Path) -> None:
    with serving(tmp_path, torch.float32) as engine:
        asked = [request(0, LONG, 8), request(1, 1, 2), request(2, 128, 3, max_new_tokens=100)]
        for version in (0, 1):
            engine.load_weights(weights(FAMILY, version), version)
            for _ in range(2):  # the second time from the prefix cache
                assert_recorded(asked, engine.generate(asked), version)
        crowd = [request(0, LONG, 32, max_new_tokens=200)]
        thread, answers = running(engine, crowd)
        engine.load_weights(weights(FAMILY, 2), 2)
        thread.join()
        mixed = [each for each in answers if set(each.policy_versions.tolist()) == {1, 2}]
        assert mixed
        assert_recorded(crowd, [each for each in answers if each.policy_versions[-1] == 2], 2)


def test_in_bf16_the_trainer_goes_the_engines_ways_and_the_mismatch_falls(tmp_path: Path) -> None:
    with serving(tmp_path, torch.bfloat16) as engine:
        asked = [request(index, 5 + 12 * index, 4) for index in range(16)]
        completions, policy = engine.generate(asked), policy_of(FAMILY, 0, torch.bfloat16)
    differing = 0
    for each in completions[::8]:
        assert each.routed_experts is not None
        recorded = np.sort(each.routed_experts)
        assert np.array_equal(experts_used(policy, replaying(asked[each.request_id], each, "experts")), recorded)
        differing += int((experts_used(policy, replaying(asked[each.request_id], each, "none")) != recorded).sum())
    assert differing > 0
    plain, experts = (mean_difference(policy, asked, completions, replay) for replay in ("none", "experts"))
    print(f"SGLang, BF16: mean |difference| {plain:.4f}, with experts {experts:.4f}")
    assert experts < 0.9 * plain
