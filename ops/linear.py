"""Linear layer: y = x W^T, the operator that carries nearly all of the arithmetic.

    linear       operands cast to `dtype` (bfloat16 or float32), accumulated in FP32, y in `dtype`
    fp32_linear  W rounded to `dtype`, but x, the product and y in FP32: router and LM head (report 5.2.1, design A5)

x [..., K] any float dtype, W [N, K] -> y [..., N]. Design A1: row m of y has the same bits for every number of rows.
Stock torch keeps that promise on a CPU under the conditions of `row_invariant_matmul`, found by measurement;
`lockstep doctor` proves them on the machine at hand. On a GPU, `ops.matmul` keeps it.

A CPU with AMX multiplies BF16 operands by `ops.amx`: there oneDNN cuts longer sums differently for every number of rows
and threads. A CPU without BF16 units multiplies them as the FP32 numbers that they are and rounds y once: the same
operator, ten times as fast there (80 against 8 GFLOP/s on one AVX2 core).
"""

import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import amx
from ops.autograd import apply
from ops.dispatch import Path, choose
from ops.jit import aligned
from ops.matmul import multiply, weight_gradient

# MKL reads this once, at its first product. Without, it cuts sums of 1024 terms and more differently for every number
# of rows and threads on some CPUs; with it, products are as fast (measured).
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# Outside these bounds the CPU libraries pick other kernels, with other bits (measured).
FP32_ROWS = 16
FP32_ROWS_PER_THREAD = 4
ALIGNMENT = 16  # bytes, of each row's start
FP32_COLUMNS = 4  # make ALIGNMENT
BF16_ROWS = 2
BF16_SMALL_PRODUCT = 4096  # rows x K x N: up to here torch does not call oneDNN
# oneDNN compiles a kernel for every new number of rows (350 microseconds here, five times the product itself), so BF16
# rows come in few sizes: powers of two, then steps.
BF16_STEP = 64


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which this CPU multiplies operands of `dtype`."""
    emulated = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if emulated else dtype


def has_tiles(dtype: torch.dtype) -> bool:
    """Does this CPU multiply operands of `dtype` by `ops.amx`?"""
    return dtype == torch.bfloat16 and amx.has_amx()


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Weight [..., N, K] as `linear` multiplies it, for one that stays the same; None where it is taken as it is."""
    return None if weight.is_cuda or not has_tiles(dtype) else amx.pack(weight)


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """y[m, n] = sum_k x[m, k] W[n, k], in the dtype of x."""
    return torch.einsum("...k,nk->...n", x, weight.to(x.dtype))


def linear(
    x: Tensor, weight: Tensor, dtype: torch.dtype, rounded: bool = False, packed: Tensor | None = None
) -> Tensor:
    """x [..., K], weight [N, K] -> [..., N] in `dtype`. Gradients come back in the dtypes of x and weight.

    rounded: the weight holds numbers of `dtype`, in whatever type it is stored; they are not rounded once more.
    packed: `pack_weight` of the weight; else it is made here.
    """
    if choose("linear", x) is Path.FAST:
        return F.linear(x.to(dtype), weight.to(dtype))
    y: Tensor = apply(_Linear, x.reshape(-1, x.shape[-1]), weight, dtype, dtype, rounded, packed)
    return y.view(*x.shape[:-1], weight.shape[0])


def fp32_linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., K] taken as FP32, weight [N, K] rounded to `dtype` -> FP32 [..., N].

    The gradient of the weight passes straight through the rounding, and is a product of FP32 numbers, as is that of x.
    """
    if choose("linear", x) is Path.FAST:
        return F.linear(x.float(), weight.to(dtype).float())
    y: Tensor = apply(_Linear, x.reshape(-1, x.shape[-1]), weight, dtype, torch.float32, False, None)
    return y.view(*x.shape[:-1], weight.shape[0])


def grouped_linear(
    x: Tensor, weight: Tensor, counts: list[int], dtype: torch.dtype, rounded: bool = False,
    packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One linear layer per group: x [M, K] in groups of `counts` rows, weight [E, N, K] -> [M, N] in `dtype`."""
    y: Tensor = apply(_GroupedLinear, x, weight, counts, dtype, rounded, packed)
    return y


def row_invariant_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] @ weight [N, K]^T, both of one dtype, no gradient: a row's bits depend neither on M nor on its place."""
    return F.linear(*_padded(x, weight))[: x.shape[0]]


def row_invariant_matmul_by_parts(x: Tensor, weight: Tensor, part: int) -> Tensor:
    """The same, with a product for each `part` rows of the weight: the bits of those products, in one result."""
    rows = x.shape[0]
    x, weight = _padded(x, weight)
    y = x.new_empty(len(x), len(weight))
    for first in range(0, len(weight), part):
        torch.mm(x, weight[first : first + part].t(), out=y[:, first : first + part])
    return y[:rows]


def padded_rows(rows: int, weight_size: int, dtype: torch.dtype) -> int:
    """Rows to multiply in place of `rows` by a weight of `weight_size` = K x N elements."""
    if product_dtype(dtype) == torch.float32:
        return -(-max(rows, FP32_ROWS_PER_THREAD * torch.get_num_threads()) // FP32_ROWS) * FP32_ROWS
    rows = max(rows, BF16_ROWS, BF16_SMALL_PRODUCT // weight_size + 1)
    if rows <= BF16_STEP:
        return 1 << (rows - 1).bit_length()
    step = BF16_STEP if rows <= 16 * BF16_STEP else 4 * BF16_STEP
    return -(-rows // step) * step


def _padded(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both operands, with zero rows and columns added where the library needs them to keep its promise."""
    rows, inner = x.shape
    missing_columns = -inner % FP32_COLUMNS if x.dtype == torch.float32 else 0
    missing_rows = padded_rows(rows, inner * weight.shape[0], x.dtype) - rows
    if missing_columns:
        weight = F.pad(weight, (0, missing_columns))
    if missing_rows or missing_columns:
        x = F.pad(x, (0, missing_columns, 0, missing_rows))
    elif x.data_ptr() % ALIGNMENT:
        x = x.clone()
    return x, weight


class _Linear(torch.autograd.Function):
    """x is cast to `precision`, weight rounded to `dtype` unless it is; the product and y are in `precision`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        dtype: torch.dtype,
        precision: torch.dtype,
        rounded: bool,
        packed: Tensor | None,
    ) -> Tensor:
        operand = x.to(precision)
        ctx.path = choose("linear", x)
        if ctx.path is Path.TRITON:
            operand, matrix = aligned(operand), aligned(weight.to(dtype))
            y = multiply(operand, matrix, precision)
        else:
            matrix = weight if rounded else weight.to(dtype)
            y = _cpu_product(operand, matrix, packed)
        ctx.save_for_backward(operand, matrix)
        ctx.dtypes = x.dtype, weight.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        backward = _triton_backward if ctx.path is Path.TRITON else _cpu_backward
        operand, matrix = ctx.saved_tensors
        return *backward(ctx, operand, matrix, grad.to(operand.dtype)), None, None, None, None


def _cpu_product(x: Tensor, matrix: Tensor, packed: Tensor | None) -> Tensor:
    """x [M, K] times matrix [N, K]^T, which holds numbers of x's type in whatever type -> [M, N] in x's type."""
    if has_tiles(x.dtype):
        return amx.multiply(x, amx.pack(matrix) if packed is None else packed, len(matrix), x.dtype)
    multiplied = product_dtype(x.dtype)
    return row_invariant_matmul(x.to(multiplied), matrix.to(multiplied)).to(x.dtype)


def _cpu_backward(ctx: Any, operand: Tensor, matrix: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    (x_dtype, weight_dtype), (rows, inner), multiplied = ctx.dtypes, operand.shape, product_dtype(operand.dtype)
    operand, matrix = _padded(operand.to(multiplied), matrix.to(multiplied))
    grad = F.pad(grad.to(multiplied), (0, 0, 0, operand.shape[0] - rows))
    grad_x = (grad @ matrix)[:rows, :inner].to(x_dtype) if ctx.needs_input_grad[0] else None
    grad_weight = (grad.t() @ operand)[:, :inner].to(weight_dtype) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight


def _triton_backward(ctx: Any, operand: Tensor, matrix: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x_dtype, weight_dtype = ctx.dtypes
    grad = aligned(grad)
    grad_x = multiply(grad, matrix, x_dtype, transposed=True) if ctx.needs_input_grad[0] else None
    grad_weight = weight_gradient(grad, operand, matrix.dtype, weight_dtype) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        counts: list[int],
        dtype: torch.dtype,
        rounded: bool,
        packed: Tensor | None,
    ) -> Tensor:
        operand, matrices = x.to(dtype), weight if rounded else weight.to(dtype)
        ctx.save_for_backward(operand, matrices)
        ctx.counts, ctx.dtypes = counts, (x.dtype, weight.dtype)
        if has_tiles(dtype):
            return amx.multiply(
                operand, amx.pack(matrices) if packed is None else packed, weight.shape[1], dtype, counts
            )
        multiplied = product_dtype(dtype)
        groups = zip(operand.to(multiplied).split(counts), matrices.to(multiplied).unbind(0), strict=True)
        return torch.cat([row_invariant_matmul(rows, matrix) for rows, matrix in groups if len(rows)]).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x_dtype, weight_dtype = ctx.dtypes
        operand, matrices = (saved.to(product_dtype(saved.dtype)) for saved in ctx.saved_tensors)
        grad = grad.to(operand.dtype)
        grad_x, grad_weight = torch.empty_like(operand), torch.empty_like(matrices)
        groups = zip(*(x.split(ctx.counts) for x in (grad, operand, grad_x)), strict=True)
        for expert, (grad_rows, rows, out) in enumerate(groups):
            torch.mm(grad_rows, matrices[expert], out=out)
            torch.mm(grad_rows.t(), rows, out=grad_weight[expert])
        return grad_x.to(x_dtype), grad_weight.to(weight_dtype), None, None, None, None
