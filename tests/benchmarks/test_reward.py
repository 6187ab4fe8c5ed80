"""The reward benchmark: its load is what it says, and both sides judge it."""

import logging

import pytest

from benchmarks import reward
from reward.config import RewardConfig
from reward.pool import RewardPool
from reward.verify import verify_fast


def test_the_load_has_its_size_and_both_verdicts() -> None:
    for mix in reward.MIXES.values():
        pairs = reward.completions(mix, reward.Load())
        assert len(pairs) == 2000 and pairs == reward.completions(mix, reward.Load())
        fast = [verify_fast(completion, gold, "\\boxed") for completion, gold in pairs]
        assert {result.score for result in fast if result} == {0.0, 1.0}


def test_both_sides_score_every_kind_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("math_verify"), "level", logging.ERROR)
    with RewardPool(RewardConfig(timeout_seconds=60.0)) as pool:
        for kind in reward.MIXES["math"]:
            result = reward.measure({kind: 1}, reward.QUICK, pool)
            assert result["same_score"] == 1.0
            our_rate, their_rate = (result[side]["completions_per_second"]["median"] for side in reward.SIDES)
            assert result["ratio"] == our_rate / their_rate > 0
