"""FP8 on the CPU path: quantisation to the letter, products of what was quantised, gradients within its error."""

import pytest
import torch

from ops import fp8
from tests.ops.checks import ROWS, assert_rows_do_not_depend_on_batch
from tests.ops.fp8_checks import assert_product, awkward


def test_hand_worked() -> None:
    """The largest value goes to 448; a group of zeros keeps scale FLOOR / 448; 17 lies between 16 and 18: to even."""
    x = torch.zeros(2, 128)
    x[0, :4] = torch.tensor([448.0, -17.0, 19.0, 0.5])
    q = fp8.quantize_rows(x)
    assert q.scale.flatten().tolist() == pytest.approx([1.0, 1e-30 / 448])
    assert q.values[0, :4].float().tolist() == [448.0, -16.0, 20.0, 0.5]
    assert q.values[1].float().abs().max() == 0


@pytest.mark.parametrize(("rows", "columns"), [(5, 128), (130, 300), (257, 128)])
def test_quantisation_equals_the_reference(rows: int, columns: int) -> None:
    x = awkward(rows, columns)
    for quantized, block in ((fp8.quantize_rows(x), 1), (fp8.quantize_weight(x).rows, 128)):
        want, scale = fp8.quantize_reference(x, block)
        assert torch.equal(quantized.dequantize(columns), want)
        assert torch.equal(quantized.scale, scale)
        assert quantized.values[:, columns:].float().abs().sum() == 0


def test_quantising_twice_changes_nothing() -> None:
    x = fp8.quantize_weight(torch.randn(130, 300)).rows
    assert torch.equal(fp8.quantize_weight(x.dequantize(300)).rows.values.float(), x.values.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(dtype: torch.dtype) -> None:
    x, weight = fp8.quantize_rows(awkward(37, 300)), fp8.quantize_weight(torch.randn(130, 300))
    assert_product(fp8.fp8_matmul(x, weight, dtype), x, weight.rows)


def test_gradients_are_products_of_quantised_operands() -> None:
    x, weight, grad = torch.randn(37, 300), torch.randn(130, 300), torch.randn(37, 130)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    grads = torch.autograd.grad(fp8.fp8_linear(*leaves), leaves, grad.bfloat16())
    grad = grad.bfloat16().float()
    weight_t = fp8.quantize_weight(weight, for_training=True).transposed
    assert weight_t is not None
    assert_product(grads[0], fp8.quantize_rows(grad), weight_t)
    assert_product(grads[1], fp8.quantize_rows(grad.t()), fp8.quantize_rows(x.t()))


@pytest.mark.parametrize("recompute", [True, False])
def test_recomputation_changes_no_bit_and_keeps_less(recompute: bool) -> None:
    x, weight = torch.randn(256, 256).requires_grad_(), torch.randn(128, 256).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fp8.fp8_linear(x, weight, recompute)
    plain = torch.autograd.grad(fp8.fp8_linear(x, weight, not recompute).float().square().sum(), (x, weight))
    mine = torch.autograd.grad(y.float().square().sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, mine, strict=True))
    new_bytes = sum(t.nbytes for t in saved if t.data_ptr() != x.data_ptr())
    assert new_bytes == (0 if recompute else 256 * 256 + 256 * 2 * 4)


def test_fused_producers() -> None:
    """Quantising what the norm or SwiGLU gives, in FP32, and their gradients through the linear layer."""
    x, norm, gate_up = torch.randn(37, 300), torch.randn(300), torch.randn(37, 600)
    from ops import rms_norm, swiglu

    for fused, plain in (
        (fp8.rms_norm_quantize(x, norm, 1e-6), fp8.quantize_rows(rms_norm(x, norm, 1e-6))),
        (fp8.swiglu_quantize(gate_up), fp8.quantize_rows(swiglu(gate_up))),
    ):
        assert torch.equal(fused.values.float(), plain.values.float())
        assert torch.equal(fused.scale, plain.scale)
    weight = torch.randn(130, 300).requires_grad_()
    leaves = [x.clone().requires_grad_(), norm.clone().requires_grad_(), weight]
    fused = torch.autograd.grad(fp8.rms_norm_fp8_linear(leaves[0], leaves[1], 1e-6, weight).float().sum(), leaves)
    plain = torch.autograd.grad(fp8.fp8_linear(rms_norm(*leaves[:2], 1e-6), weight).float().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))
    leaves = [gate_up.clone().requires_grad_(), weight]
    fused = torch.autograd.grad(fp8.swiglu_fp8_linear(*leaves).float().sum(), leaves)
    plain = torch.autograd.grad(fp8.fp8_linear(swiglu(leaves[0]), weight).float().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))


@pytest.mark.usefixtures("threads")
def test_row_bits_do_not_depend_on_the_batch() -> None:
    weight = torch.randn(130, 300)
    assert_rows_do_not_depend_on_batch(lambda x: (fp8.fp8_linear(x, weight),), torch.randn(ROWS, 300))
