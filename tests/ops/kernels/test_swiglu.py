"""swiglu in Triton. Bounds as on the CPU path, in tests/ops/test_swiglu.py."""

import pytest
import torch

import ops
from tests.ops.checks import UNIT, assert_within, differentiate, differentiate_fp64
from tests.ops.kernels.harness import DEVICE, assert_rows_alone

U = UNIT[torch.float32]


@pytest.mark.parametrize("width", [1, 37, 128, 1100])
def test_output_and_gradient(width: int) -> None:
    """sigmoid: 4 u; each further product, sum or quotient 1 u. 1 - s is exact to u of 1, so the gate's gradient is held
    against grad * up * (1 + |gate|)."""
    gate_up, grad = torch.randn(9, 2 * width).to(DEVICE), torch.randn(9, width).to(DEVICE)
    got = differentiate(ops.swiglu, (gate_up,), grad)
    want = differentiate_fp64(ops.swiglu_reference, (gate_up,), grad)
    assert_within(got.output, want.output, 8 * U * want.output.abs())
    gate, up = gate_up.abs().double().chunk(2, dim=-1)
    bound = torch.cat([(1 + gate) * up, gate], dim=-1) * grad.abs().repeat(1, 2)
    assert_within(got.inputs[0], want.inputs[0], 14 * U * bound)


def test_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    gate_up = torch.randn(9, 74).to(DEVICE, torch.bfloat16)
    assert torch.equal(ops.swiglu(gate_up), ops.swiglu(gate_up.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_bits_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    assert_rows_alone(lambda x: (ops.swiglu(x),), [torch.randn(70, 74).to(DEVICE, dtype)])
