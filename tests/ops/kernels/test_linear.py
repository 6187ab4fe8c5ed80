"""linear and fp32_linear in Triton: bounds as on the CPU path; the same bits for every batch and form of a sum."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ops import linear_reference, matmul
from ops.linear import fp32_linear, linear
from tests.ops.checks import UNIT, assert_within, differentiate, differentiate_fp64, magnitude
from tests.ops.kernels.harness import DEVICE, adversarial, assert_rows_alone, poison

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [FP32, BF16]
U = UNIT[FP32]
Operator = Callable[[Tensor, Tensor, torch.dtype], Tensor]
OPERATORS = [linear, fp32_linear]


def random(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


def cancelling(rows: int, inner: int, outer: int) -> tuple[Tensor, Tensor]:
    """Terms that cancel: what is left of a sum is its rounding error, which shows the order even in BF16."""
    order = torch.randperm(inner)
    x, weight = random(rows, inner // 2), random(outer, inner // 2)
    return torch.cat([x, x], dim=1)[:, order], torch.cat([weight, -weight], dim=1)[:, order]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 37, 29), (33, 131, 3), (130, 64, 140)])
def test_output_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The bound of the CPU path. Gradients of FP32 leaves are not even rounded to dtype."""
    rows, inner, outer = shape
    inputs = (random(rows, inner).to(dtype).float(), random(outer, inner).to(dtype).float())
    grad = random(rows, outer).to(dtype)
    got = differentiate(lambda x, w: linear(x, w, dtype), inputs, grad)
    want = differentiate_fp64(linear_reference, inputs, grad)
    size = magnitude(linear_reference, inputs, grad)
    accumulated = inner * U * size.output
    assert_within(got.output, want.output, accumulated + UNIT[dtype] * (want.output.abs() + accumulated))
    for index, terms in enumerate((outer, rows)):
        assert_within(got.inputs[index], want.inputs[index], terms * U * size.inputs[index])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 37, 29), (33, 600, 3), (70, 64, 130)])
def test_fp32_output_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """As an FP32 product with the rounded weight; BF16 terms make three or six times the additions."""
    rows, inner, outer = shape
    inputs, grad = (random(rows, inner), random(outer, inner)), random(rows, outer)
    rounded = (inputs[0], inputs[1].to(dtype).float())
    got = differentiate(lambda x, w: fp32_linear(x, w, dtype), inputs, grad)
    want = differentiate_fp64(linear_reference, rounded, grad)
    size = magnitude(linear_reference, rounded, grad)
    assert got.output.dtype == FP32
    assert_within(got.output, want.output, 3 * inner * U * size.output)
    assert_within(got.inputs[0], want.inputs[0], 3 * outer * U * size.inputs[0])
    assert_within(got.inputs[1], want.inputs[1], 6 * rows * U * size.inputs[1])


def test_the_gradients_keep_more_than_bf16() -> None:
    """1 + 2^-20 has no BF16 neighbour but 1: rounding either operand of a gradient would lose the difference."""
    x, weight = torch.full((1, 1), 1 + 2.0**-20, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    got = differentiate(lambda x, w: fp32_linear(x, w, BF16), (x, weight), x)
    assert got.output.item() == got.inputs[0].item() == 1 + 2.0**-20
    assert got.inputs[1].item() == 1 + 2.0**-19


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "outer"), [(46, 9), (1100, 5)])
def test_row_bits_do_not_depend_on_the_batch(operator: Operator, dtype: torch.dtype, inner: int, outer: int) -> None:
    x, weight = cancelling(70, inner, outer)
    assert_rows_alone(lambda x: (operator(x, weight, dtype),), [x], counts=(1, 17))


def test_a_segment_that_follows_the_batch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = cancelling(70, 1100, 5)

    def run(x: Tensor) -> tuple[Tensor]:
        monkeypatch.setattr(matmul, "segment_length", lambda *_: 512 if len(x) < 64 else 1024)
        return (linear(x, weight, BF16),)

    with pytest.raises(AssertionError, match="rows from 0 differ"):
        assert_rows_alone(run, [x], counts=(17,))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_alone_and_in_one_program(
    operator: Operator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three segments, the last one short: merged by the second kernel, or summed by one program."""
    tile = matmul.FP32_TILE if dtype is FP32 else matmul.SPLIT_TILE if operator is fp32_linear else matmul.BF16_TILE
    x, weight = cancelling(3, 2 * tile.segment + 52, 5)
    with adversarial(order_seed=1):
        alone = operator(x, weight, dtype)
    monkeypatch.setattr(matmul, "PROGRAMS", 0)
    with adversarial(order_seed=2):
        together = operator(x, weight, dtype)
    assert torch.equal(alone, together)
    monkeypatch.setattr(matmul, "segment_length", lambda *_: 4 * tile.segment)
    assert not torch.equal(alone, operator(x, weight, dtype)), "the segments leave no trace in the bits"


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_bits_depend_neither_on_the_order_of_programs_nor_on_the_form(
    operator: Operator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "ROWS_SEGMENT", 64)
    inputs, grad = (random(140, 70), random(40, 70)), random(140, 40)
    results = []
    for seed in (1, 2, 3):
        if seed == 3:  # as with many tiles: one program does all segments
            monkeypatch.setattr(matmul, "PROGRAMS", 0)
            monkeypatch.setattr(matmul, "FILLING", 0)
        with adversarial(seed):
            results.append(differentiate(lambda x, w: operator(x, w, dtype), inputs, grad).inputs)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_neither_memory_beside_the_operands_nor_unwritten_scratch_is_read(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, grad = random(3, 1100), random(5, 1100), random(3, 5)
    want = differentiate(lambda x, w: operator(x, w, BF16), (x, weight), grad)

    def like(x: Tensor, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return poison(*shape, dtype=dtype)

    def walled(x: Tensor) -> Tensor:
        wall = poison(3 * x.numel() + 8, dtype=x.dtype)
        return wall[8 : 8 + x.numel()].view(x.shape).copy_(x)

    monkeypatch.setattr(matmul, "like", like)
    monkeypatch.setitem(linear.__globals__, "aligned", walled)
    got = differentiate(lambda x, w: operator(x, w, BF16), (x, weight), grad)
    assert torch.equal(got.output, want.output)
    assert all(torch.equal(a, b) for a, b in zip(got.inputs, want.inputs, strict=True))


def test_no_rows() -> None:
    inputs = (random(0, 7), random(5, 7))
    got = differentiate(lambda x, w: linear(x, w, BF16), inputs, random(0, 5))
    assert got.output.shape == (0, 5)
    assert got.inputs[0].shape == (0, 7)
    assert torch.equal(got.inputs[1], torch.zeros(5, 7, device=DEVICE))


def test_dtypes_and_shapes() -> None:
    x, weight = random(3, 1, 5).requires_grad_(), random(7, 5).to(BF16).requires_grad_()
    y = linear(x, weight, BF16)
    y.sum().backward()
    assert y.shape == (3, 1, 7)
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (BF16, FP32, BF16)


@pytest.mark.parametrize(
    ("width", "inner", "tile", "expected"),
    [
        (6144, 2048, matmul.BF16_TILE, 2048),  # 48 tiles: two segments would be more than 64 programs
        (2048, 2048, matmul.BF16_TILE, 1024),  # 16 tiles: four segments, but none shorter than 1024
        (2048, 5120, matmul.BF16_TILE, 1280),
        (256, 2048, matmul.SPLIT_TILE, 256),
        (5, 70, matmul.BF16_TILE, 1024),
        (2048, 5000, matmul.BF16_TILE, 1280),  # a multiple of the 64 terms of a step
    ],
)
def test_segment_length(width: int, inner: int, tile: matmul.Tile, expected: int) -> None:
    assert matmul.segment_length(width, inner, tile) == expected
