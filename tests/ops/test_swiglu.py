"""swiglu: silu(gate) times up."""

import math

import pytest
import torch

import ops
from tests.ops.checks import (
    ROWS,
    UNIT,
    assert_rows_do_not_depend_on_batch,
    assert_within,
    differentiate,
    differentiate_fp64,
)

DTYPES = [torch.float32, torch.bfloat16]


def test_hand_worked() -> None:
    """sigmoid(log 3) = 3/4."""
    y = ops.swiglu(torch.tensor([[math.log(3), 0.0, -200.0, 200.0, 4.0, 5.0, 3.0, 3.0]]))
    torch.testing.assert_close(y, torch.tensor([[3 * math.log(3), 0.0, 0.0, 600.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 96])
def test_output_and_gradient(width: int, dtype: torch.dtype) -> None:
    """s = sigmoid(g) is off by 5 u s (exp 2, sum 1, reciprocal 1, and one to spare), 1 - s by 6 u; each product adds u:

    y 8 u |y|      d up = dy g s: 8 u |dy g|      d gate = dy up (s + g s (1 - s)): 16 u |dy up| (1 + |g|)

    and one rounding to dtype at the end.
    """
    gate_up, grad = (3 * torch.randn(5, 2 * width)).to(dtype), torch.randn(5, width).to(dtype)
    got = differentiate(ops.swiglu, (gate_up,), grad)
    want = differentiate_fp64(ops.swiglu_reference, (gate_up,), grad)
    gate, up = gate_up.double().abs().chunk(2, dim=-1)
    dy, u = grad.double().abs(), UNIT[torch.float32]
    bounds = 8 * u * want.output.abs(), torch.cat([16 * u * dy * up * (1 + gate), 8 * u * dy * gate], dim=-1)
    for actual, expected, bound in zip((got.output, *got.inputs), (want.output, *want.inputs), bounds, strict=True):
        assert actual.dtype == dtype
        rounding = UNIT[dtype] * (expected.abs() + bound) if dtype == torch.bfloat16 else 0.0
        assert_within(actual, expected, bound + rounding)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 13, 37, 96])
def test_row_bits_do_not_depend_on_the_batch(width: int, dtype: torch.dtype) -> None:
    assert_rows_do_not_depend_on_batch(lambda x: (ops.swiglu(x),), torch.randn(ROWS, 2 * width).to(dtype))
