"""Asynchronous runs: numeric and staleness part of a mismatch, and how old the weights were."""

import numpy as np
import pytest

from rl.metrics.mismatch import mismatch_values
from rl.metrics.pairs import Pairs
from rl.metrics.staleness import split, staleness_metrics


def sides() -> list[list[np.ndarray]]:
    generator = np.random.default_rng(3)
    rollout = [-generator.random(n).astype(np.float32) for n in (5, 17, 1)]
    own = [each + generator.normal(0, 1e-6, len(each)).astype(np.float32) for each in rollout]
    train = [each + generator.normal(0, 0.1, len(each)).astype(np.float32) for each in own]
    return [train, own, rollout]


def test_the_parts_add_up() -> None:
    """The float32 values here are multiples of 2^-49 and the sums of their differences below 16, so that float64 adds
    them exactly; three divisions by 23 and one addition of values below 1 then round by 2^-53 at most each."""
    train, own, rollout = sides()
    found = split(train, own, rollout)
    whole = mismatch_values(Pairs.of(train, rollout))
    for name in ("log_prob_diff_mean", "k1"):
        parts = found[f"mismatch_numeric/{name}"] + found[f"mismatch_staleness/{name}"]
        assert parts == pytest.approx(whole[name], rel=0, abs=4 * 2**-53)
    assert 0 < found["mismatch_numeric/log_prob_diff_max"] < 1e-5 < found["mismatch_staleness/log_prob_diff_max"]


def test_an_aligned_run_has_no_numeric_part() -> None:
    train, own, _ = sides()
    found = split(train, own, own)
    assert found["mismatch_numeric/tokens_compared"] == 23 and found["mismatch_numeric/tokens_unequal"] == 0
    assert found["mismatch_numeric/k3"] == found["mismatch_numeric/log_prob_diff_max"] == 0
    assert found["mismatch_staleness/tokens_unequal"] == 23


def test_a_mask_and_nothing() -> None:
    train, own, rollout = sides()
    masks = [np.ones(5, bool), np.zeros(17, bool), np.zeros(1, bool)]
    assert split(train, own, rollout, masks) == split(train[:1], own[:1], rollout[:1])
    assert split([], [], []) == {}


def test_staleness_by_hand() -> None:
    versions = [np.array([3, 3, 4]), np.array([5, 5, 5]), np.zeros(0, np.int64)]
    assert staleness_metrics(versions, 5) == {
        "staleness/mean": 5 / 6,
        "staleness/max": 2.0,
        "staleness/fraction": 0.5,
        "staleness/mixed_fraction": 0.5,
    }
    assert staleness_metrics([np.zeros(0, np.int64)], 5) == {}
