"""SwiGLU: y = silu(gate) * up with silu(g) = g * sigmoid(g) (Shazeer 2020, 2002.05202), computed in FP32.

gate_up [..., 2F] holds gate then up; y [..., F] in the dtype of gate_up.
"""

from typing import Any

import torch
from torch import Tensor

from ops.autograd import apply
from ops.compiled import compiled, number, share, stored
from ops.compiled import sigmoid as sigmoid_of
from ops.dispatch import Path, choose
from ops.elementwise import kernel_sigmoid, sigmoid
from ops.jit import aligned, divide_up, jit, launch, like, next_power_of_two, tl


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# The CPU path.


@compiled
def _cpu_kernel(begin, end, gate_up, y):
    """Items are rows."""
    width = y.shape[1]
    for row in range(begin, end):
        gates, ups, target = gate_up[row, :width], gate_up[row, width:], y[row]
        for i in range(width):
            value = number(gates[i])
            target[i] = stored(sigmoid_of(value) * value * number(ups[i]), y)


def _cpu_forward(gate_up: Tensor) -> Tensor:
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    y = rows.new_empty(len(rows), rows.shape[1] // 2)
    share(_cpu_kernel, len(rows), 20 * y.numel(), rows, y)
    return y.view(*gate_up.shape[:-1], -1)


def _cpu_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    s, grad, half = sigmoid(gate), grad.float(), gate.shape[-1]
    silu = gate * s
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate_up[..., :half] = torch.rsub(s, 1.0).mul_(silu).add_(s).mul_(up).mul_(grad)
    grad_gate_up[..., half:] = silu.mul_(grad)
    return grad_gate_up


# The Triton path.


@jit("rows")
def _forward_kernel(gate_up_ptr, y_ptr, rows, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    inside = (row < rows) & (column < F)
    gate = tl.load(gate_up_ptr + row * (2 * F) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * F) + F + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * F + column, kernel_sigmoid(gate) * gate * up, mask=inside)


@jit("rows")
def _backward_kernel(
    gate_up_ptr, grad_ptr, grad_gate_up_ptr, rows, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    inside = (row < rows) & (column < F)
    gate = tl.load(gate_up_ptr + row * (2 * F) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * F) + F + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * F + column, mask=inside, other=0.0).to(tl.float32)
    s = kernel_sigmoid(gate)
    silu = gate * s
    tl.store(grad_gate_up_ptr + row * (2 * F) + column, ((1.0 - s) * silu + s) * up * grad, mask=inside)
    tl.store(grad_gate_up_ptr + row * (2 * F) + F + column, silu * grad, mask=inside)


_TILE = 4096  # elements a program holds


def _grid(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    block_f = min(next_power_of_two(width), 1024)
    block_r = _TILE // block_f
    return (divide_up(rows, block_r), divide_up(width, block_f)), {"F": width, "BLOCK_R": block_r, "BLOCK_F": block_f}


def _triton_forward(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    rows = gate_up.numel() // (2 * width)
    y = like(gate_up, *gate_up.shape[:-1], width, dtype=gate_up.dtype)
    grid, blocks = _grid(rows, width)
    launch(_forward_kernel, grid, gate_up, y, rows, **blocks)
    return y


def _triton_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    rows = gate_up.numel() // (2 * width)
    grad_gate_up = like(gate_up, *gate_up.shape, dtype=gate_up.dtype)
    grid, blocks = _grid(rows, width)
    launch(_backward_kernel, grid, gate_up, aligned(grad), grad_gate_up, rows, **blocks)
    return grad_gate_up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.path = choose("swiglu", gate_up)
        gate_up = aligned(gate_up) if ctx.path is Path.TRITON else gate_up
        ctx.save_for_backward(gate_up)
        return _triton_forward(gate_up) if ctx.path is Path.TRITON else _cpu_forward(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return _triton_backward(gate_up, grad) if ctx.path is Path.TRITON else _cpu_backward(gate_up, grad)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F] -> [..., F]."""
    y: Tensor = apply(_SwiGLU, gate_up)
    return y
