"""RMSNorm, and the grouped RMSNorm with a sigmoid gate that closes a Ring-linear attention layer (report 2.2.3).

    rms_norm(x)            = x * rsqrt(mean(x^2) + eps) * w                      over the last dimension
    grouped_rms_norm_gate  = rms_norm over each of G equal groups of channels, times w, times sigmoid(gate)

Inputs of any float dtype, FP32 inside and out (design A5); weight [D] is per channel in both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dispatch import Path, choose
from ops.elementwise import kernel_sigmoid, sigmoid
from ops.jit import aligned, divide_up, jit, launch, like, next_power_of_two, tl


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def grouped_rms_norm_gate_reference(x: Tensor, weight: Tensor, gate: Tensor, groups: int, eps: float) -> Tensor:
    grouped = x.unflatten(-1, (groups, -1))
    return rms_norm_reference(grouped, weight.view(groups, -1), eps).flatten(-2) * torch.sigmoid(gate)


# The CPU path.


def _torch_forward(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., R, D], weight [R, D], gate like x -> y like x, and the scale of each row [..., R, 1]."""
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = (x * scale).mul_(weight)
    return (y if gate is None else y.mul_(sigmoid(gate.float()))), scale


def _torch_backward(
    x: Tensor, weight: Tensor, gate: Tensor | None, scale: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    normed, grad_gate = x * scale, None
    if gate is not None:
        s = sigmoid(gate.float())
        grad_gate = (grad * (normed * weight)).mul_(s).mul_(1.0 - s)
        grad = grad * s
    grad_weight = (grad * normed).sum_to_size(weight.shape)
    grad = grad * weight
    mean = (grad * normed).mean(-1, keepdim=True)
    return grad.sub_(normed.mul_(mean)).mul_(scale), grad_weight, grad_gate


# The Triton path: a program normalises BLOCK_R whole rows, so a row's sum never leaves it.


@jit("rows")
def _forward_kernel(
    x_ptr, weight_ptr, gate_ptr, y_ptr, scale_ptr, rows, eps,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + (row % HEADS)[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.div_rn(tl.sum(x * x, axis=1), D * 1.0) + eps)
    y = x * scale[:, None] * weight
    if GATED:
        y = y * kernel_sigmoid(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(y_ptr + at, y, mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@jit("rows")
def _backward_kernel(
    x_ptr, weight_ptr, gate_ptr, scale_ptr, grad_ptr, grad_x_ptr, grad_gate_ptr, partial_ptr, rows,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Program (p, h) walks TILES tiles of BLOCK_R tokens of head h, and writes its own sum for the weight."""
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + head * D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for tile in range(TILES):
        row = ((tl.program_id(0) * TILES + tile) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64) * HEADS + head
        inside = (row < rows)[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            s = kernel_sigmoid(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32))
            tl.store(grad_gate_ptr + at, grad * (normed * weight) * s * (1.0 - s), mask=inside)
            grad = grad * s
        total += tl.sum(grad * normed, axis=0)
        grad = grad * weight
        mean = tl.div_rn(tl.sum(grad * normed, axis=1), D * 1.0)[:, None]
        tl.store(grad_x_ptr + at, (grad - normed * mean) * scale, mask=inside)
    at = (tl.program_id(0) * HEADS + head) * D + column
    tl.store(partial_ptr + at, total, mask=column < D)


_TILE = 4096  # elements a program holds
_BACKWARD_TILES = 8


def _blocks(dim: int) -> dict[str, int]:
    block = next_power_of_two(dim)
    return {"D": dim, "BLOCK_D": block, "BLOCK_R": max(1, _TILE // block), "warps": 4 if block <= 4096 else 8}


def _triton_forward(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    heads, dim = weight.shape
    rows, blocks = x.numel() // dim, _blocks(dim)
    y, scale = like(x, *x.shape), like(x, *x.shape[:-1], 1)
    launch(
        _forward_kernel, (divide_up(rows, blocks["BLOCK_R"]),), x, weight, x if gate is None else gate, y, scale, rows,
        eps, HEADS=heads, GATED=gate is not None, **blocks,
    )  # fmt: skip
    return y, scale


def _triton_backward(
    x: Tensor, weight: Tensor, gate: Tensor | None, scale: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    heads, dim = weight.shape
    rows, blocks = x.numel() // dim, _blocks(dim)
    programs = divide_up(rows // heads, blocks["BLOCK_R"] * _BACKWARD_TILES)
    grad_x, grad_gate, partial = like(x, *x.shape), like(x, *x.shape), like(x, programs, heads, dim)
    launch(
        _backward_kernel, (programs, heads), x, weight, x if gate is None else gate, scale, grad, grad_x, grad_gate,
        partial, rows, HEADS=heads, TILES=_BACKWARD_TILES, GATED=gate is not None, **blocks,
    )  # fmt: skip
    return grad_x, partial.sum(0), None if gate is None else grad_gate


class _RMSNorm(torch.autograd.Function):
    """x [..., R, D], weight [R, D], gate like x or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
        ctx.path = choose("rms_norm", x)
        ctx.dtypes = x.dtype, weight.dtype, None if gate is None else gate.dtype
        if ctx.path is not Path.TRITON:
            x, weight = x.float(), weight.float()
        x, weight, gate = aligned(x), aligned(weight), None if gate is None else aligned(gate)
        forward = _triton_forward if ctx.path is Path.TRITON else _torch_forward
        y, scale = forward(x, weight, gate, eps)
        ctx.save_for_backward(x, weight, gate, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, gate, scale = ctx.saved_tensors
        backward = _triton_backward if ctx.path is Path.TRITON else _torch_backward
        grad_x, grad_weight, grad_gate = backward(x, weight, gate, scale, aligned(grad))
        x_dtype, weight_dtype, gate_dtype = ctx.dtypes
        grad_gate = None if grad_gate is None else grad_gate.to(gate_dtype)
        return grad_x.to(x_dtype), grad_weight.to(weight_dtype), grad_gate, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D], or [H, D] for one per head of x [..., H, D] -> FP32 like x."""
    if choose("rms_norm", x) is Path.FAST:
        return F.rms_norm(x.float(), x.shape[-1:], None, eps) * weight.float()
    weight = weight.view(-1, x.shape[-1])
    y: Tensor = _RMSNorm.apply(x.reshape(-1, *weight.shape), weight, None, eps)
    return y.view(x.shape)


def grouped_rms_norm_gate(x: Tensor, weight: Tensor, gate: Tensor, groups: int, eps: float) -> Tensor:
    """x, gate [..., D], weight [D], D divisible by `groups` -> FP32 [..., D]."""
    weight = weight.view(groups, -1)
    shape = (-1, *weight.shape)
    y: Tensor = _RMSNorm.apply(x.reshape(shape), weight, gate.reshape(shape), eps)
    return y.view(x.shape)
