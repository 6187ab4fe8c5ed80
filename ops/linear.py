"""Linear layer: y = x W^T, the operator that carries nearly all of the arithmetic.

    linear       operands cast to `dtype` (bfloat16 or float32), accumulated in FP32, y in `dtype`
    fp32_linear  W rounded to `dtype`, but x, the product and y in FP32: router (report 5.2.1, design A5)

x [..., K] any float dtype, W [N, K] -> y [..., N]. Design A1: row m of y has the same bits for every number of rows,
by `ops.cpu_matmul` on a CPU and by `ops.matmul` on a GPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import cpu_matmul
from ops.autograd import apply
from ops.dispatch import Path, choose
from ops.jit import aligned
from ops.matmul import multiply, weight_gradient


def pack_weight(weight: Tensor, dtype: torch.dtype, fp32_rows: bool = False) -> Tensor | None:
    """Weight [..., N, K], for one that stays the same, as `linear` and the LM head multiply it, or `fp32_linear` if
    its rows are FP32; None on a GPU, where it is taken as it is."""
    if weight.is_cuda:
        return None
    return cpu_matmul.pack(weight, dtype, _in_pairs(dtype) and not fp32_rows)


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
    return _linear(x, weight, dtype, dtype, rounded, packed)


def fp32_linear(x: Tensor, weight: Tensor, dtype: torch.dtype, packed: Tensor | None = None) -> Tensor:
    """x [..., K] taken as FP32, weight [N, K] rounded to `dtype` -> FP32 [..., N].

    The gradient of the weight passes straight through the rounding, and is a product of FP32 numbers, as is that of x.
    packed: `pack_weight` of the weight; else it is made here.
    """
    if choose("linear", x) is Path.FAST:
        return F.linear(x.float(), weight.to(dtype).float())
    return _linear(x, weight, dtype, torch.float32, False, packed)


def _linear(
    x: Tensor, weight: Tensor, dtype: torch.dtype, precision: torch.dtype, rounded: bool, packed: Tensor | None
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if packed is not None and not torch.is_grad_enabled() and choose("linear", x) is Path.CPU:
        rows = rows if _in_pairs(precision) else rows.to(precision)  # a product in pairs rounds its rows itself
        y = cpu_matmul.multiply(rows, packed, weight.shape[0], precision)
    else:
        y = apply(_Linear, rows, weight, dtype, precision, rounded, packed)
    return y.view(*x.shape[:-1], weight.shape[0])


def grouped_linear(
    x: Tensor, weight: Tensor, bounds: Tensor, dtype: torch.dtype, rounded: bool = False, packed: Tensor | None = None
) -> Tensor:
    """One linear layer per group, on a CPU: rows bounds[e] .. bounds[e + 1] - 1 of x [M, K] with weight e of [E, N, K]
    -> [M, N] in `dtype`. bounds int64 [E + 1]."""
    y: Tensor = apply(_GroupedLinear, x, weight, bounds, dtype, rounded, packed)
    return y


def _in_pairs(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and cpu_matmul.has_pairs()


def _packed(weight: Tensor, dtype: torch.dtype, precision: torch.dtype, packed: Tensor | None) -> Tensor:
    """The weight rounded to `dtype`, packed for rows of type `precision`."""
    if packed is None:
        packed = pack_weight(weight, dtype, fp32_rows=precision == torch.float32)
    assert packed is not None, "a weight on a GPU met rows on a CPU"
    return packed


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
            y = cpu_matmul.multiply(operand, _packed(matrix, dtype, precision, packed), len(matrix), precision)
        ctx.save_for_backward(operand, matrix)
        ctx.dtypes = x.dtype, weight.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        backward = _triton_backward if ctx.path is Path.TRITON else _cpu_backward
        operand, matrix = ctx.saved_tensors
        return *backward(ctx, operand, matrix, grad.to(operand.dtype)), None, None, None, None


def _cpu_backward(ctx: Any, operand: Tensor, matrix: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    (x_dtype, weight_dtype), matrix = ctx.dtypes, matrix.to(operand.dtype)
    grad_x = cpu_matmul.matmul(grad, matrix, grad.dtype).to(x_dtype) if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = cpu_matmul.matmul(grad.t(), operand, grad.dtype).to(weight_dtype)
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
        bounds: Tensor,
        dtype: torch.dtype,
        rounded: bool,
        packed: Tensor | None,
    ) -> Tensor:
        operand, matrices = x.to(dtype), weight if rounded else weight.to(dtype)
        ctx.save_for_backward(operand, matrices, bounds)
        ctx.dtypes = x.dtype, weight.dtype
        return cpu_matmul.multiply(operand, _packed(matrices, dtype, dtype, packed), weight.shape[1], dtype, bounds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (x_dtype, weight_dtype), (operand, matrices, bounds) = ctx.dtypes, ctx.saved_tensors
        matrices, grad = matrices.to(operand.dtype), grad.to(operand.dtype)
        packed = cpu_matmul.pack(matrices, operand.dtype, _in_pairs(operand.dtype), transposed=True)
        grad_x = cpu_matmul.multiply(grad, packed, operand.shape[1], operand.dtype, bounds)
        grad_weight, counts = torch.zeros_like(matrices), bounds.diff().tolist()
        for out, each, rows in zip(grad_weight, grad.split(counts), operand.split(counts), strict=True):
            if len(rows):
                out.copy_(cpu_matmul.matmul(each.t(), rows, operand.dtype))
        return grad_x.to(x_dtype), grad_weight.to(weight_dtype), None, None, None, None
