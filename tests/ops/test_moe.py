"""route and experts: who is chosen, with what weight, and in what order the chosen are summed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ops
from tests.ops.checks import (
    ROWS,
    UNIT,
    assert_rows_do_not_depend_on_batch,
    assert_within,
    differentiate,
    differentiate_fp64,
    magnitude,
)

DTYPES = [torch.float32, torch.bfloat16]
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


def made_experts(dtype: torch.dtype, tokens: int = 21) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """ids [T, 3] of 6 experts, expert 4 idle; x, gate_up, down, weights representable in dtype."""
    dim, width = 19, 7
    ids = torch.stack([torch.tensor([0, 1, 2, 3, 5])[torch.randperm(5)[:3]].sort().values for _ in range(tokens)])
    x, gate_up, down = torch.randn(tokens, dim), torch.randn(6, 2 * width, dim), torch.randn(6, dim, width)
    rounded = (t.to(dtype).float() for t in (x, gate_up / dim**0.5, down / width**0.5))
    return ids, (*rounded, torch.rand(tokens, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_against_reference(dtype: torch.dtype) -> None:
    """Errors scale with the same network on absolute values, whose silu' is at least 1/2 where the network's own is at
    most 1.1 and bends by at most 1/2: a factor 2.2, and 1 + G for the bend, with G the largest absolute gate sum.

    FP32: the chain sums D, F, D and k terms (and T for a weight's gradient), plus 20 single steps.
    BF16: on top, at most 8 results on the way are rounded to dtype.
    """
    ids, inputs = made_experts(dtype)
    x, gate_up = inputs[:2]
    grad = torch.randn_like(x).to(dtype).float()

    def reference(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        return ops.experts_reference(x, gate_up, down, ids, weights)

    got = differentiate(lambda x, w_in, w_out, w: ops.experts(x, w_in, w_out, ids, w, dtype), inputs, grad)
    want, size = differentiate_fp64(reference, inputs, grad), magnitude(reference, inputs, grad)
    steps = (2 * x.shape[1] + 7 + 3 + len(x) + 20) * U + (8 * UNIT[dtype] if dtype == torch.bfloat16 else 0.0)
    gate = torch.einsum("tk,efk->tef", x.abs(), gate_up.abs()).max().item()
    factor = 2.2 * (1 + gate) * steps
    for actual, expected, absolute in zip(
        (got.output, *got.inputs), (want.output, *want.inputs), (size.output, *size.inputs), strict=True
    ):
        assert_within(actual, expected, factor * absolute)


def test_idle_expert_has_zero_gradient() -> None:
    ids, inputs = made_experts(torch.float32)
    got = differentiate(lambda x, w_in, w_out, w: ops.experts(x, w_in, w_out, ids, w, torch.float32), inputs, inputs[0])
    for gradient in got.inputs[1:3]:
        assert gradient[4].count_nonzero() == 0
        assert gradient[5].count_nonzero() > 0


@pytest.mark.parametrize(("weights", "total"), [([2.0**25, -(2.0**25), 1.0], 1.25), ([1.0, 2.0**25, -(2.0**25)], 0.0)])
def test_sum_runs_in_ascending_expert_order(weights: list[float], total: float) -> None:
    """Each expert returns exactly 1.25, which FP32 loses next to 1.25 * 2^25: silu(40) = 40, times 1, times 1/32."""
    gate_up, down = torch.tensor([[[40.0], [1.0]]]).expand(3, 2, 1), torch.full((3, 1, 1), 1 / 32)
    ids = torch.tensor([[0, 1, 2]])
    y = ops.experts(torch.ones(1, 1), gate_up, down, ids, torch.tensor([weights]), torch.float32)
    assert y.item() == total


@pytest.mark.usefixtures("threads")
def test_routing_of_a_token_does_not_depend_on_its_batch() -> None:
    bias = 0.1 * torch.randn(40)
    assert_rows_do_not_depend_on_batch(lambda x: ops.route(x, bias, 4, 5, 3, 2.5), torch.randn(ROWS, 40))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "width"), [(19, 7), (64, 32)])
def test_output_of_a_token_does_not_depend_on_its_batch(dim: int, width: int, dtype: torch.dtype) -> None:
    gate_up, down = torch.randn(8, 2 * width, dim), torch.randn(8, dim, width)
    ids, weights = ops.route(torch.randn(ROWS, 8), torch.zeros(8), 2, 1, 1, 1.0)
    assert_rows_do_not_depend_on_batch(
        lambda x, i, w: (ops.experts(x, gate_up, down, i, w, dtype),), torch.randn(ROWS, dim), ids, weights
    )
