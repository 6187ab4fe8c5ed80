"""route: who is chosen, and with what weight."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ops
from tests.ops.checks import (
    ROWS,
    UNIT,
    assert_rows_do_not_depend_on_batch,
    assert_within,
    differentiate,
    differentiate_fp64,
)

U = UNIT[torch.float32]


def route(logits: list[float], bias: list[float], *settings: int, scale: float = 1.0) -> tuple[list[int], list[float]]:
    """settings: top_k, num_groups, top_groups."""
    ids, weights = ops.route(torch.tensor([logits]), torch.tensor(bias), *settings, scale)
    return ids[0].tolist(), weights[0].tolist()


def test_weights_are_unbiased_scores_renormalised_and_scaled() -> None:
    """Scores 3/4, 1/2, 1/4, 1/2; the bias lifts expert 2 above 1 and 3. 3/4 and 1/4 make 1, times 2.5."""
    ids, weights = route([math.log(3), 0.0, -math.log(3), 0.0], [0.0, 0.0, 0.4, 0.0], 2, 1, 1, scale=2.5)
    assert ids == [0, 2]
    assert weights == pytest.approx([1.875, 0.625])


def test_group_is_judged_by_its_two_best() -> None:
    """Biased scores 1.4, 0 | 0.8, 0.8: the best expert of all stands in the weaker group."""
    assert route([0.0] * 4, [0.9, -0.5, 0.3, 0.3], 1, 2, 1) == ([2], [1.0])


@pytest.mark.parametrize(("experts", "settings"), [(8, (3, 4, 2)), (256, (8, 8, 4)), (64, (6, 1, 1))])
def test_equal_scores_choose_the_lowest_indices(experts: int, settings: tuple[int, int, int]) -> None:
    assert route([0.0] * experts, [0.0] * experts, *settings)[0] == list(range(settings[0]))


# Logits whose sigmoid is exact (0, 1/2 and 1), so that ties are ties in every precision.
exact_logits = st.lists(st.sampled_from([-200.0, 0.0, 40.0]), min_size=16, max_size=16)


@given(st.lists(exact_logits, min_size=1, max_size=5), st.sampled_from([(2, 1, 1), (3, 4, 2), (4, 8, 3)]))
def test_ties_are_broken_like_the_reference(logits: list[list[float]], settings: tuple[int, int, int]) -> None:
    ids, _ = ops.route(torch.tensor(logits), torch.zeros(16), *settings, 1.0)
    assert torch.equal(ids, ops.route_reference(torch.tensor(logits), torch.zeros(16), *settings, 1.0)[0])


@pytest.mark.parametrize("settings", [(2, 1, 1), (4, 4, 2), (8, 8, 4)])
def test_route_against_reference(settings: tuple[int, int, int]) -> None:
    """s is off by 5 u s, the sum of k by k u, so a weight by (k + 12) u. Its derivative s (1 - s) scale / sum times
    (g - mean) is at most 2 max|g| scale, since s / sum <= 1; it carries two weights, s again and 1 - s:
    (2 k + 40) u."""
    top_k, scale = settings[0], 2.5
    logits, bias, grad = torch.randn(33, 32), 0.1 * torch.randn(32), torch.randn(33, top_k)
    ids = ops.route(logits, bias, *settings, scale)[0]
    assert torch.equal(ids, ops.route_reference(logits.double(), bias.double(), *settings, scale)[0])
    assert torch.equal(ids, ids.sort(dim=-1).values)
    got = differentiate(lambda x: ops.route(x, bias, *settings, scale)[1], (logits,), grad)
    want = differentiate_fp64(lambda x: ops.route_reference(x, bias, *settings, scale)[1], (logits,), grad)
    assert_within(got.output, want.output, (top_k + 12) * U * want.output)
    assert_within(got.inputs[0], want.inputs[0], (2 * top_k + 40) * U * 2 * grad.abs().max().item() * scale)


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_scores_against_reference(renormalize: bool) -> None:
    """As above; the softmax adds the rounding of E summands and of a shift by the largest logit."""
    logits, grad, settings = torch.randn(33, 24), torch.randn(33, 4), (4, 1, 1, 1.0, "softmax", renormalize)
    got = differentiate(lambda x: ops.route(x, None, *settings)[1], (logits,), grad)
    want = differentiate_fp64(lambda x: ops.route_reference(x, None, *settings)[1], (logits,), grad)
    ids = ops.route(logits, None, *settings)[0]
    assert torch.equal(ids, ops.route_reference(logits.double(), None, *settings)[0])
    assert_within(got.output, want.output, (24 + 30) * U * want.output)
    assert_within(got.inputs[0], want.inputs[0], 200 * U * grad.abs().max().item())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_routing_of_a_token_does_not_depend_on_its_batch(scoring: str) -> None:
    bias = 0.1 * torch.randn(40)
    run = lambda x: ops.route(x, bias, 4, 5, 3, 2.5, scoring)  # noqa: E731
    assert_rows_do_not_depend_on_batch(run, torch.randn(ROWS, 40))


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_of_given_experts_have_the_bits_of_route(scoring: str, renormalize: bool) -> None:
    logits, grad = torch.randn(33, 24), torch.randn(33, 4)
    ids, weights = ops.route(logits, None, 4, 1, 1, 2.5, scoring, renormalize)
    assert torch.equal(ops.expert_weights(logits, ids, 2.5, scoring, renormalize), weights)
    routed = differentiate(lambda x: ops.route(x, None, 4, 1, 1, 2.5, scoring, renormalize)[1], (logits,), grad)
    given = differentiate(lambda x: ops.expert_weights(x, ids, 2.5, scoring, renormalize), (logits,), grad)
    assert torch.equal(given.inputs[0], routed.inputs[0])


def test_weights_of_experts_that_the_router_would_not_choose() -> None:
    """Scores 3/4, 1/2, 1/4: the first two would win; of the last two the weights are 2/3 and 1/3, times 3."""
    logits = torch.tensor([[math.log(3), 0.0, -math.log(3)]])
    weights = ops.expert_weights(logits, torch.tensor([[1, 2]]), 3.0)
    assert weights[0].tolist() == pytest.approx([2.0, 1.0])


def test_recorded_weights_are_the_value_and_own_ones_get_the_gradient() -> None:
    """The second token has no record. With d = 3 w0 + w1, whatever w is: the gradients of own weights are 3 and 1."""
    own = torch.tensor([[0.7, 0.3], [0.6, 0.4]], requires_grad=True)
    recorded = torch.tensor([[0.75, 0.25], [math.nan, math.nan]])
    weights = ops.replayed_weights(own, recorded)
    assert weights.tolist() == [[0.75, 0.25], own[1].tolist()]
    (weights * torch.tensor([3.0, 1.0])).sum().backward()
    assert own.grad is not None and own.grad.tolist() == [[3.0, 1.0], [3.0, 1.0]]
    with torch.no_grad():
        assert torch.equal(ops.replayed_weights(own, recorded), weights)
