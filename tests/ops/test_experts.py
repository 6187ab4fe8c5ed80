"""experts: what the chosen return, and in what order it is summed."""

import pytest
import torch
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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "width"), [(19, 7), (64, 32)])
def test_output_of_a_token_does_not_depend_on_its_batch(dim: int, width: int, dtype: torch.dtype) -> None:
    gate_up, down = torch.randn(8, 2 * width, dim), torch.randn(8, dim, width)
    ids, weights = ops.route(torch.randn(ROWS, 8), torch.zeros(8), 2, 1, 1, 1.0)
    assert_rows_do_not_depend_on_batch(
        lambda x, i, w: (ops.experts(x, gate_up, down, i, w, dtype),), torch.randn(ROWS, dim), ids, weights
    )
