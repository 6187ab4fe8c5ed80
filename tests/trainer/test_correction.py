"""Weights and masks against numbers worked out by hand, and against those that other projects' functions give."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.correction import CorrectionSums, correction_weights
from trainer.correction_config import BOUNDS, CorrectionConfig

# Two sequences, for which verl's and slime's own functions were run: docs name the values "golden".
ROLLOUT = torch.tensor([-0.10, -1.20, -1.50, -3.00, -0.70, -2.00], dtype=torch.float64)
DIFF = torch.tensor([0.05, -0.20, 1.00, -1.50, 0.00, 0.30], dtype=torch.float64)
LENGTHS = (4, 2)
METHODS = [method for method in BOUNDS if method != "none"]


def golden(method: str, advantages: tuple[float, ...] = (1.0,) * 6, **bounds) -> tuple[list[float], dict[str, float]]:
    config = CorrectionConfig(method=method, **bounds)
    weights, sums = correction_weights(ROLLOUT + DIFF, ROLLOUT, torch.tensor(advantages), LENGTHS, config)
    return weights.tolist(), {name.removeprefix("correction/"): value for name, value in sums.metrics().items()}


def test_token_tis_as_in_verl() -> None:
    weights, metrics = golden("token_tis")
    assert weights == pytest.approx([math.exp(0.05), math.exp(-0.2), 2.0, math.exp(-1.5), 1.0, math.exp(0.3)])
    # verl's batch norm factor is the mean too.
    assert (metrics["weight_mean"], metrics["weight_ess"]) == pytest.approx((1.073832, 0.800089), abs=5e-7)
    assert metrics["truncated_fraction"] == pytest.approx(1 / 6)
    assert metrics["masked_fraction"] == 0


def test_sequence_tis_as_in_verl() -> None:
    weights, metrics = golden("sequence_tis")
    assert weights == pytest.approx([0.522046] * 4 + [1.349859] * 2, abs=5e-7)
    assert metrics["truncated_fraction"] == 0
    weights, metrics = golden("sequence_tis", cap=1.0)
    assert weights == pytest.approx([0.522046] * 4 + [1.0] * 2, abs=5e-7)
    assert metrics["truncated_fraction"] == pytest.approx(2 / 6)


def test_icepop_as_in_verl() -> None:
    """verl's bounds are 0.5 and 2; the authors' 0.5 and 5 keep e^1."""
    weights, metrics = golden("icepop", high=2.0)
    assert weights == pytest.approx([math.exp(0.05), math.exp(-0.2), 0.0, 0.0, 1.0, math.exp(0.3)])
    assert (metrics["weight_mean"], metrics["weight_ess"]) == pytest.approx((0.703310, 0.645525), abs=5e-7)
    assert metrics["masked_fraction"] == pytest.approx(0.333333, abs=5e-7)
    assert (metrics["masked_fraction_low"], metrics["masked_fraction_high"]) == pytest.approx((1 / 6, 1 / 6))
    weights, metrics = golden("icepop")
    assert weights[2:4] == pytest.approx([math.e, 0.0])
    assert metrics["masked_fraction_high"] == 0


def test_sequence_mask_keeps_the_weight_of_what_it_keeps() -> None:
    weights, metrics = golden("sequence_mask")
    assert weights == pytest.approx([0.522046] * 4 + [1.349859] * 2, abs=5e-7)
    weights, metrics = golden("sequence_mask", low=0.6)
    assert weights == pytest.approx([0.0] * 4 + [1.349859] * 2, abs=5e-7)
    assert (metrics["masked_fraction_low"], metrics["sequences_masked"]) == pytest.approx((4 / 6, 1))


def test_geometric_mask_weighs_nothing() -> None:
    """Means of d: -0.1625 and 0.15, so exp is 0.850016 and 1.161834."""
    assert golden("geometric_mask")[0] == [0.0] * 6
    weights, metrics = golden("geometric_mask", low=0.85, high=1.16)
    assert weights == [1.0] * 4 + [0.0] * 2
    assert (metrics["masked_fraction_high"], metrics["sequences_masked"]) == pytest.approx((2 / 6, 1))
    assert golden("geometric_mask", low=0.8501, high=1.17)[0] == [0.0] * 4 + [1.0] * 2


def coin_divergence(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_kpop_bounds_the_larger_direction_of_two_coins() -> None:
    """p = 0.9, q = 0.5: KL(p || q) = 0.368064 < KL(q || p) = 0.510826. p = 0.02, q = 0.1: 0.051 < 0.0839, though their
    ratio 0.2 is outside IcePop's bounds."""
    q, p = torch.tensor([0.5, 0.1, 0.5], dtype=torch.float64), torch.tensor([0.9, 0.02, 0.1], dtype=torch.float64)
    assert coin_divergence(0.5, 0.9) == pytest.approx(0.510826, abs=5e-7)
    assert coin_divergence(0.9, 0.5) == pytest.approx(0.368064, abs=5e-7)

    def kept(bound: float) -> tuple[list[float], CorrectionSums]:
        config = CorrectionConfig(method="kpop", max_binary_kl=bound)
        weights, sums = correction_weights(p.log(), q.log(), torch.ones(3), (3,), config)
        return weights.tolist(), sums

    weights, sums = kept(0.5107)
    assert weights == pytest.approx([0.0, 0.2, 0.0])
    assert (sums.high, sums.low) == (1, 1)
    assert kept(0.5109)[0] == pytest.approx([1.8, 0.2, 0.2])
    assert kept(0.08)[0] == [0.0] * 3
    assert kept(0.085)[0] == pytest.approx([0.0, 0.2, 0.0])


def test_kpop_is_finite_for_certain_and_impossible_tokens() -> None:
    record = torch.tensor([0.0, -300.0, 0.0])
    config = CorrectionConfig(method="kpop")
    weights, _ = correction_weights(torch.tensor([0.0, -300.0, -300.0]), record, torch.ones(3), (3,), config)
    assert weights.tolist() == [1.0, 1.0, 0.0]


def test_a_token_that_the_trainer_cannot_believe_drops_its_sequence() -> None:
    """exp(-1.5) = 0.223130."""
    weights, metrics = golden("token_tis", veto=0.2232)
    assert weights == pytest.approx([0.0] * 4 + [1.0, math.exp(0.3)])
    assert (metrics["sequences_vetoed"], metrics["sequences_masked"]) == (1, 1)
    assert metrics["truncated_fraction"] == 0, "what is left out is not truncated"
    assert golden("token_tis", veto=0.2231)[1]["sequences_vetoed"] == 0
    assert golden("none", veto=0.2232)[0] == [0.0] * 4 + [1.0] * 2


def test_off_policy_sequences_are_left_out_where_they_are_to_be_punished() -> None:
    """The mean of -d is 0.1625 in the first sequence and -0.15 in the second."""
    punished, rewarded = (-1.0,) * 6, (1.0,) * 6
    assert golden("none", punished, off_policy_delta=0.16)[0] == [0.0] * 4 + [1.0] * 2
    assert golden("none", punished, off_policy_delta=0.16)[1]["sequences_off_policy"] == 1
    assert golden("none", punished, off_policy_delta=0.17)[0] == [1.0] * 6
    assert golden("none", rewarded, off_policy_delta=0.16)[0] == [1.0] * 6


@pytest.mark.parametrize("method", METHODS)
def test_agreement_in_every_bit_gives_a_weight_of_exactly_one(method: str) -> None:
    log_probs = torch.tensor([-0.1, -7.3, -90.0])
    config = CorrectionConfig(method=method, veto=1e-4, off_policy_delta=1e-9)
    weights, sums = correction_weights(log_probs, log_probs.clone(), -torch.ones(3), (1, 2), config)
    assert torch.equal(weights, torch.ones(3))
    assert (sums.masked, sums.truncated, sums.metrics()["correction/weight_ess"]) == (0, 0, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_extreme_differences_stay_finite_and_a_nan_stays_one(method: str) -> None:
    record = torch.tensor([-1.0, -200.0, -1.0, -1.0])
    log_probs = torch.tensor([-500.0, -1.0, -1.0, math.nan])
    weights, _ = correction_weights(log_probs, record, torch.ones(4), (1, 1, 1, 1), CorrectionConfig(method=method))
    assert weights[:3].isfinite().all()
    if method != "geometric_mask":  # 1 or 0 whatever is kept; the loss holds the NaN itself
        assert weights[3].isnan()


def test_a_mask_of_everything_pools_to_zeros() -> None:
    metrics = golden("geometric_mask")[1]
    assert (metrics["weight_mean"], metrics["weight_ess"], metrics["masked_fraction"]) == (0.0, 0.0, 1.0)
    assert metrics["sequences_masked"] == 2


@given(
    seed=st.integers(0, 2**31),
    method=st.sampled_from(METHODS),
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=6),
)
def test_micro_batches_give_the_same_weights_and_counts(seed: int, method: str, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    record, noise, advantages = torch.randn(3, sum(lengths), dtype=torch.float64, generator=generator)
    config = CorrectionConfig(method=method, veto=0.2, off_policy_delta=0.5)
    whole, expected = correction_weights(record + noise, record, advantages, lengths, config)
    parts, pooled = [], CorrectionSums()
    for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        one = slice(start, end)
        weights, sums = correction_weights((record + noise)[one], record[one], advantages[one], (end - start,), config)
        parts.append(weights)
        pooled = pooled + sums
    assert torch.equal(torch.cat(parts), whole)
    assert vars(pooled) == pytest.approx(vars(expected))


def test_auto_resolves_to_what_the_regime_needs() -> None:
    assert CorrectionConfig().resolved(agrees=True) == CorrectionConfig(method="none")
    assert CorrectionConfig().resolved(agrees=False) == CorrectionConfig(method="token_tis", cap=2.0, veto=1e-4)
    assert CorrectionConfig(veto=0.01).resolved(agrees=False).veto == 0.01
    chosen = CorrectionConfig(method="icepop", high=2.0)
    for agrees in (True, False):
        assert chosen.resolved(agrees) == CorrectionConfig(method="icepop", low=0.5, high=2.0)
    for method in BOUNDS:
        resolved = CorrectionConfig(method=method).resolved(agrees=False)
        assert CorrectionConfig.model_validate(resolved.model_dump()) == resolved


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "icepop", "cap": 2.0}, "cap is not a bound of method 'icepop', but of token_tis, sequence_tis"),
        ({"cap": 2.0}, "cap is not a bound of method 'auto'"),
        ({"method": "icepop", "low": 6.0}, "low = 6.0 and high = 5.0 keep nothing"),
        ({"method": "kpop", "max_binary_kl": 0.0}, "greater than 0"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CorrectionConfig.model_validate(fields)
