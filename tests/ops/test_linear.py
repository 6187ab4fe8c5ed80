"""linear: exact up to accumulation error, and a row's bits do not depend on the rows beside it."""

import pytest
import torch

import ops
from ops.dispatch import use_fast
from ops.linear import fp32_linear
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


def test_hand_worked() -> None:
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, -6.0], [0.0, 0.5]])
    assert ops.linear(x, weight, torch.float32).tolist() == [[11.0, -7.0, 1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 37, 29), (33, 131, 3)])
def test_output_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """A sum of n products in FP32 is off by n u sum |terms| at most (Higham, 3.5), then rounded once to dtype."""
    rows, inner, outer = shape
    # Rounded beforehand, so that the operator's own casts are exact.
    inputs = (torch.randn(rows, inner).to(dtype).float(), torch.randn(outer, inner).to(dtype).float())
    grad = torch.randn(rows, outer).to(dtype)
    got = differentiate(lambda x, w: ops.linear(x, w, dtype), inputs, grad)
    want = differentiate_fp64(ops.linear_reference, inputs, grad)
    size = magnitude(ops.linear_reference, inputs, grad)
    for actual, expected, absolute, terms in zip(
        (got.output, *got.inputs),
        (want.output, *want.inputs),
        (size.output, *size.inputs),
        (inner, outer, rows),
        strict=True,
    ):
        accumulated = terms * UNIT[torch.float32] * absolute
        assert_within(actual, expected, accumulated + UNIT[dtype] * (expected.abs() + accumulated))


def test_dtypes() -> None:
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, dtype=torch.bfloat16, requires_grad=True)
    y = ops.linear(x.view(3, 1, 5), weight, torch.bfloat16)
    y.sum().backward()
    assert y.shape == (3, 1, 7)
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1), (19, 7), (32, 8), (48, 33), (64, 64), (96, 128), (301, 257), (480, 1536), (481, 96), (768, 96),
        (1280, 24), (1024, 512), (4096, 64),
    ],
)  # fmt: skip
def test_row_bits_do_not_depend_on_the_batch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Terms that cancel: what is left of a sum is its rounding error, which shows the order even in BF16."""
    inner, outer = shape
    half, order = -(-inner // 2), torch.randperm(inner)
    x, weight = torch.randn(ROWS, half), torch.randn(outer, half)
    x, weight = torch.cat([x, x], dim=1)[:, order], torch.cat([weight, -weight], dim=1)[:, order]
    assert_rows_do_not_depend_on_batch(lambda x: (ops.linear(x, weight, dtype),), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_bits_do_not_depend_on_the_address(dtype: torch.dtype) -> None:
    x, weight = torch.randn(16, 20), torch.randn(3, 20)
    expected = ops.linear(x, weight, dtype)
    for offset in range(1, 8):
        moved = torch.empty(8 + x.numel())[offset : offset + x.numel()].view_as(x).copy_(x)
        assert torch.equal(ops.linear(moved, weight, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp32_linear_rounds_the_weight_and_nothing_else(dtype: torch.dtype) -> None:
    """The bits of an FP32 layer with the rounded weight, and its gradients, straight through the rounding."""
    inputs, grad = (torch.randn(5, 37), torch.randn(29, 37)), torch.randn(5, 29)
    got = differentiate(lambda x, w: fp32_linear(x, w, dtype), inputs, grad)
    rounded = (inputs[0], inputs[1].to(dtype).float())
    want = differentiate(lambda x, w: ops.linear(x, w, torch.float32), rounded, grad)
    assert torch.equal(got.output, want.output)
    assert all(torch.equal(a, b) for a, b in zip(got.inputs, want.inputs, strict=True))
    assert torch.equal(got.output, fp32_linear(inputs[0], inputs[1].to(dtype), dtype)), "a stored weight differs"


def test_fast_form() -> None:
    x, weight = torch.randn(3, 2, 37), torch.randn(29, 37)
    use_fast(["linear"])
    try:
        fast, fast_fp32 = ops.linear(x, weight, torch.bfloat16), fp32_linear(x, weight, torch.bfloat16)
    finally:
        use_fast([])
    assert torch.equal(fast, torch.nn.functional.linear(x.bfloat16(), weight.bfloat16()))
    assert torch.equal(fast_fp32, torch.nn.functional.linear(x, weight.bfloat16().float()))
