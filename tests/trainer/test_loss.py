"""The losses against numbers worked out by hand, and under any cut into micro-batches."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.loss import LossSums, policy_loss

# Ratios 1, 1.5, 0.5, 1.5, 0.5 under the clip range [0.8, 1.25].
RATIOS = [1.0, 1.5, 0.5, 1.5, 0.5]
ADVANTAGES = [2.0, 1.0, 1.0, -1.0, -1.0]
CLIP = (0.2, 0.25)


def five_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    old_log_probs = torch.full((5,), -2.0, dtype=torch.float64)
    log_probs = (old_log_probs + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
    return log_probs, old_log_probs, torch.tensor(ADVANTAGES, dtype=torch.float64)


def test_policy_loss_by_hand() -> None:
    log_probs, old_log_probs, advantages = five_tokens()
    loss, sums = policy_loss(log_probs, old_log_probs, advantages, 10, *CLIP)
    # Surrogates: 2; min(1.5, 1.25); min(0.5, 0.8); min(-1.5, -1.25); min(-0.5, -0.8). Their sum is 1.45.
    assert loss.item() == pytest.approx(-0.145, abs=1e-12)
    assert sums.loss == loss.item()
    assert (sums.tokens, sums.clipped) == (5, 2)
    assert sums.ratio_max == pytest.approx(1.5, abs=1e-12)
    # k3 = ratio - 1 - log(ratio): 0, twice 0.5 - log(1.5), twice -0.5 + log(2).
    assert sums.kl == pytest.approx(2 * (0.5 - math.log(1.5)) + 2 * (-0.5 + math.log(2)), abs=1e-12)


def test_gradient_is_minus_ratio_times_advantage_and_nothing_where_clipped() -> None:
    log_probs, old_log_probs, advantages = five_tokens()
    loss, _ = policy_loss(log_probs, old_log_probs, advantages, 10, *CLIP)
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([-0.2, 0.0, -0.05, 0.15, 0.0], abs=1e-12)


def test_equal_log_probs_give_a_ratio_of_exactly_one() -> None:
    log_probs = torch.tensor([-0.1, -7.3, -30.0])
    _, sums = policy_loss(log_probs, log_probs.clone(), torch.tensor([1.0, -1.0, 0.5]), 3, *CLIP)
    assert (sums.ratio_max, sums.kl, sums.clipped) == (1.0, 0.0, 0)


def test_pooling_does_not_lose_a_nan() -> None:
    assert math.isnan((LossSums(ratio_max=2.0) + LossSums(ratio_max=math.nan)).ratio_max)
    assert math.isnan((LossSums(ratio_max=math.nan) + LossSums(ratio_max=2.0)).ratio_max)


@given(seed=st.integers(0, 2**31), cuts=st.sets(st.integers(1, 39), max_size=6))
def test_micro_batches_give_the_same_loss_gradient_and_metrics(seed: int, cuts: set[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    old_log_probs, noise, advantages = torch.randn(3, 40, dtype=torch.float64, generator=generator)
    whole = (old_log_probs + 0.3 * noise).requires_grad_()
    loss, sums = policy_loss(whole, old_log_probs, advantages, 40, *CLIP)
    loss.backward()

    parts = whole.detach().clone().requires_grad_()
    edges = [0, *sorted(cuts), 40]
    pooled = LossSums()
    for start, end in itertools.pairwise(edges):
        part = slice(start, end)
        part_loss, part_sums = policy_loss(parts[part], old_log_probs[part], advantages[part], 40, *CLIP)
        part_loss.backward()
        pooled = pooled + part_sums

    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-12)
    assert (pooled.tokens, pooled.clipped, pooled.ratio_max) == (sums.tokens, sums.clipped, sums.ratio_max)
    assert (pooled.loss, pooled.kl) == pytest.approx((sums.loss, sums.kl), abs=1e-12)
