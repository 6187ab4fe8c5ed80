"""Profiles: buckets of positions and lengths, and the exponent that tells noise from bias."""

import numpy as np
import pytest

from rl.metrics.by_position import length_metrics, profile_metrics
from rl.metrics.pairs import Pairs


def of(*differences: list[float]) -> Pairs:
    return Pairs.of([np.array(each) - 1 for each in differences], [np.full(len(each), -1.0) for each in differences])


def test_positions_and_lengths_fall_into_their_buckets() -> None:
    found = profile_metrics(of([1.0] * 16 + [3.0], [-0.5] * 2))
    assert found["position/0-15"] == pytest.approx((16 * 1.0 + 2 * 0.5) / 18)
    assert found["position/16-63"] == 3.0
    assert found["length/0-15"] == 0.5 and found["length/16-63"] == pytest.approx(19 / 17)
    assert not any(name.startswith("position/64") for name in found)


def test_the_last_bucket_is_open() -> None:
    found = profile_metrics(of([0.0] * 70000))
    assert "position/65536-" in found and "length/65536-" in found


def test_bias_has_exponent_0_and_noise_one_half() -> None:
    """A bias of 0.01 gives every length the same mean. Noise: the standard error of the slope is 2.22 / 2 =
    std(log |N(0, 1)|) = 1.11 over sqrt(S) times the spread of log T: about 0.02 here, and 4 of those are allowed."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(16, 1024, 3000)
    assert length_metrics(lengths, np.full(3000, 0.01))["length_exponent"] == pytest.approx(0.0, abs=1e-12)
    noise = length_metrics(lengths, np.abs(generator.normal(size=3000) / np.sqrt(lengths)))
    error = 1.11 / np.sqrt(3000) / np.log(lengths).std()
    assert noise["length_exponent_error"] == pytest.approx(error, rel=0.1)
    assert noise["length_exponent"] == pytest.approx(-0.5, abs=4 * error)


def test_a_slope_that_means_nothing_is_left_out() -> None:
    assert length_metrics(np.array([4, 4, 4, 4]), np.array([0.1, 0.2, 0.3, 0.4])) == {}
    assert length_metrics(np.array([4, 8, 16]), np.array([0.1, 0.2, 0.0])) == {}
    assert length_metrics(np.zeros(0, np.int64), np.zeros(0)) == {}
