"""Lockstep's own mismatch metrics on values worked by hand, and what they are where both sides agree."""

import math

import numpy as np
import pytest

from rl.metrics.mismatch import OF_ONE_SIDE, mismatch_metrics, mismatch_values, tokens_unequal
from rl.metrics.pairs import Pairs
from tests.rl.metrics.golden import golden, printed

ONE_AT_AGREEMENT = {"ppl_ratio", "pearson", "ess"}


def test_the_golden_values() -> None:
    values = mismatch_values(golden())
    names = ("k1", "k2", "k3", "chi2_token", "chi2_seq", "ppl_train", "ppl_rollout", "ppl_ratio")
    assert printed(values, *names) == (
        ["0.058333", "0.281875", "0.251879", "1.006075", "0.047325", "4.167725", "4.060270", "1.018578"]
    )
    assert printed(values, "prob_diff_max", "prob_diff_mean", "pearson") == ["0.383400", "0.095069", "0.879505"]
    assert printed(values, "log_prob_diff_abs_mean", "log_prob_diff_max") == ["0.508333", "1.500000"]


def test_the_log_probs_of_sides_that_agree() -> None:
    log_probs = [np.log(np.array([0.1, 0.7, 0.3], np.float32)), np.log(np.array([0.9, 0.2], np.float32))]
    values = mismatch_values(Pairs.of(log_probs, [each.copy() for each in log_probs]))
    assert {name for name, value in values.items() if value == 1.0} == ONE_AT_AGREEMENT
    others = values.keys() - ONE_AT_AGREEMENT - set(OF_ONE_SIDE)
    assert {name for name, value in values.items() if value == 0.0} == others


def test_quantiles_and_spread_by_hand() -> None:
    """|d| = 0, 1, 2, 3, 4 with one negative d: mean of d 6/5, of its square 6, so the variance is 6 - 1.44."""
    d = np.array([0.0, 1.0, -2.0, 3.0, 4.0])
    values = mismatch_values(Pairs.of([d - 5], [np.full(5, -5.0)]))
    assert [values[f"log_prob_diff_{name}"] for name in ("p50", "p90", "p99")] == pytest.approx([2.0, 3.6, 3.96])
    assert values["log_prob_diff_std"] == pytest.approx(math.sqrt(6 - 1.44))
    assert (values["log_prob_diff_mean"], values["log_prob_diff_abs_mean"]) == (1.2, 2.0)


def test_a_bound_belongs_to_its_band() -> None:
    """Ratios 0.5, 1, 2, 5: the logs of these round to values whose exponentials are exact."""
    ratios = np.array([0.5, 1.0, 2.0, 5.0])
    assert (np.exp(np.log(ratios)) <= np.array([0.5, 1, 2, 5.0])).all()
    values = mismatch_values(Pairs.of([np.log(ratios)], [np.zeros(4)]))
    names = ("outside_half_to_2", "outside_half_to_5", "outside_1_percent", "outside_5_percent")
    assert [values[name] for name in names] == [0.25, 0.0, 0.75, 0.75]


def test_effective_sample_size_by_hand() -> None:
    """Weights 1 and 3: mean 2, mean square 5."""
    values = mismatch_values(Pairs.of([np.log(np.array([1.0, 3.0]))], [np.zeros(2)]))
    assert values["ess"] == pytest.approx(4 / 5)


def test_a_far_token_overflows_nothing() -> None:
    values = mismatch_values(Pairs.of([np.array([-1.0, -0.5])], [np.array([-2000.0, -0.5])]))
    assert values["k3"] == math.inf and values["k2"] == 1999.0**2 / 4
    assert values["chi2_token"] == pytest.approx((math.exp(40) + 1) / 2 - 1) and values["chi2_seq"] < math.inf


def test_not_a_number_is_unequal_and_is_not_hidden() -> None:
    pairs = Pairs.of([np.array([np.nan, -1.0], np.float32)], [np.array([np.nan, -1.0], np.float32)])
    values = mismatch_values(pairs)
    assert tokens_unequal(pairs) == 1
    assert math.isnan(values["k3"]) and math.isnan(values["log_prob_diff_max"]) and math.isnan(values["ess"])
    assert values["outside_half_to_5"] == 0.5


def test_pearson_where_no_side_or_only_one_varies() -> None:
    certain = [np.zeros(3)]
    assert mismatch_values(Pairs.of(certain, certain))["pearson"] == 1.0
    values = mismatch_values(Pairs.of([np.array([-1.0, -1.0])], [np.array([-1.0, -2.0])]))
    assert math.isnan(values["pearson"])


def test_one_ulp_is_seen() -> None:
    rollout = np.array([-1.5, -0.25], np.float32)
    train = np.nextafter(rollout, np.float32(0))
    pairs = Pairs.of([train], [rollout])
    assert tokens_unequal(pairs) == 2
    values = mismatch_metrics(pairs)
    assert values["mismatch/log_prob_diff_max"] == 2.0**-23
    assert values["mismatch/k3"] > 0
