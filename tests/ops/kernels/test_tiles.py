"""Tile products: three BF16 terms are the whole number, and products of terms are as good as FP32 ones."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ops.jit import jit, launch, tl, triton_dtype
from ops.tiles import accumulate, accumulate_fp32, grouped_tile, split_terms
from tests.ops.checks import UNIT, assert_within
from tests.ops.kernels.harness import DEVICE, poison

BF16, FP32 = torch.bfloat16, torch.float32


@jit()
def _terms_kernel(x_ptr, terms_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    high, middle, low = split_terms(tl.load(x_ptr + at))
    tl.store(terms_ptr + at, high)
    tl.store(terms_ptr + SIZE + at, middle)
    tl.store(terms_ptr + 2 * SIZE + at, low)


@jit()
def _product_kernel(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr, OPERAND: tl.constexpr, FP32_PRODUCT: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + row * SIZE + column), tl.load(b_ptr + row * SIZE + column)
    acc = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    y = accumulate_fp32(a, b, acc, OPERAND) if FP32_PRODUCT else accumulate(a, b, acc, OPERAND)
    tl.store(y_ptr + row * SIZE + column, y)


@jit("rows")
def _tile_kernel(y_ptr, rows, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    row, column = grouped_tile(tl.program_id(0), rows, COLUMNS, GROUP)
    tl.store(y_ptr + row * COLUMNS + column, tl.program_id(0).to(tl.float32))


def test_the_terms_of_a_number_sum_to_it_exactly() -> None:
    """24 bits in three times 8; exponents from 2^-100, far above what BF16 cannot hold, to 2^127."""
    size = 4096
    bits = np.random.default_rng(0).integers(27 << 23, 254 << 23, size, dtype=np.uint32)
    x = torch.from_numpy(bits.view(np.float32)) * torch.tensor([1.0, -1.0]).repeat(size // 2)
    terms = torch.empty(3, size, dtype=BF16, device=DEVICE)
    launch(_terms_kernel, (1,), x.to(DEVICE), terms, SIZE=size)
    assert torch.equal(terms.double().sum(0).cpu(), x.double())
    assert torch.equal(terms[0].cpu(), x.bfloat16())


@pytest.mark.parametrize("b_dtype", [FP32, BF16])
@pytest.mark.parametrize("a_dtype", [FP32, BF16])
@pytest.mark.parametrize("operand", [FP32, BF16])
def test_fp32_products(operand: torch.dtype, a_dtype: torch.dtype, b_dtype: torch.dtype) -> None:
    a, b = torch.randn(64, 64).to(DEVICE, a_dtype), torch.randn(64, 64).to(DEVICE, b_dtype)
    bound = 6 * 64 * UNIT[FP32] * (a.double().abs() @ b.double().abs())
    assert_within(product(a, b, operand, fp32=True), a.double() @ b.double(), bound)


def test_a_plain_product_rounds_its_operands() -> None:
    a, b = torch.randn(64, 64).to(DEVICE), torch.randn(64, 64).to(DEVICE)
    assert torch.equal(product(a, b, BF16, fp32=False), product(a.bfloat16(), b.bfloat16(), BF16, fp32=True))


def product(a: Tensor, b: Tensor, operand: torch.dtype, fp32: bool) -> Tensor:
    y = torch.empty(a.shape, device=DEVICE)
    launch(_product_kernel, (1,), a, b, y, SIZE=64, OPERAND=triton_dtype(operand), FP32_PRODUCT=fp32, warps=8)
    return y


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (8, 3), (19, 4)])
def test_every_tile_has_one_program(rows: int, columns: int) -> None:
    y = poison(rows, columns)
    launch(_tile_kernel, (rows * columns,), y, rows, COLUMNS=columns, GROUP=8)
    assert sorted(y.flatten().tolist()) == list(range(rows * columns))
    assert y[: min(rows, 8), 0].tolist() == list(range(min(rows, 8))), "a group goes down its first column first"
