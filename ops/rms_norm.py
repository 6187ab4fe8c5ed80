"""RMSNorm, and the grouped RMSNorm with a sigmoid gate that closes a Ring-linear attention layer (report 2.2.3).

    rms_norm(x)            = x * rsqrt(mean(x^2) + eps) * w                      over the last dimension
    add_rms_norm(h, d)     = h + d, rms_norm(h + d): the residual stream takes in a layer's output on the way
    grouped_rms_norm_gate  = rms_norm over each of G equal groups of channels, times w, times sigmoid(gate)

Inputs of any float dtype, FP32 inside and out (design A5); weight [D] is per channel.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.autograd import apply
from ops.compiled import ONE, compiled, dot_16, f32, number, plain, readable, share
from ops.compiled import sigmoid as sigmoid_of
from ops.dispatch import Path, choose
from ops.elementwise import kernel_sigmoid, sigmoid
from ops.jit import aligned, divide_up, jit, launch, like, next_power_of_two, tl


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def grouped_rms_norm_gate_reference(x: Tensor, weight: Tensor, gate: Tensor, groups: int, eps: float) -> Tensor:
    grouped = x.unflatten(-1, (groups, -1))
    return rms_norm_reference(grouped, weight.view(groups, -1), eps).flatten(-2) * torch.sigmoid(gate)


# The CPU path. Everywhere below: x [..., R, D], weight [R, D], gate and delta like x.


@compiled
def norm_scale(x, eps):
    """1 / rms of a row."""
    return ONE / np.sqrt(dot_16(x, x) / f32(x.shape[0]) + eps)


@compiled
def _cpu_norm_kernel(begin, end, x, delta, weight, gate, eps, total, y, scale):
    """Items are rows [D]; delta and gate may have none."""
    for row in range(begin, end):
        source, target, factors = x[row], y[row], weight[row % weight.shape[0]]
        if delta.shape[0] > 0:
            added, source = delta[row], total[row]
            for i in range(added.shape[0]):
                source[i] = x[row, i] + number(added[i])
        scale[row] = by = norm_scale(source, eps)
        for i in range(source.shape[0]):
            target[i] = source[i] * by * factors[i]
        if gate.shape[0] > 0:
            gates = gate[row]
            for i in range(source.shape[0]):
                target[i] *= sigmoid_of(number(gates[i]))


def _cpu_forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its norm, and the scale of each row [..., R, 1]."""
    y, scale, dim = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1), x.shape[-1]
    total, none = x if delta is None else torch.empty_like(x), x.new_empty(0, dim)
    rows = (none if each is None else readable(each).view(-1, dim) for each in (x, delta, gate))
    values, added, gates = rows
    share(
        _cpu_norm_kernel, len(values), 8 * x.numel(), values, added, weight, gates, f32(eps), total.view(-1, dim),
        y.view(-1, dim), scale.view(-1),
    )  # fmt: skip
    return total, y, scale


def norm_backward(
    x: Tensor, weight: Tensor, gate: Tensor | None, scale: Tensor, grad: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the sum, the weight and the gate."""
    normed, grad_gate = x * scale, None
    if gate is not None:
        s = sigmoid(gate.float())
        grad_gate = (grad * (normed * weight)).mul_(s).mul_(1.0 - s)
        grad = grad * s
    grad_weight = (grad * normed).sum_to_size(weight.shape)
    grad = grad * weight
    mean = (grad * normed).mean(-1, keepdim=True)
    grad_x = grad.sub_(normed.mul_(mean)).mul_(scale)
    return (grad_x if grad_sum is None else grad_x.add_(grad_sum)), grad_weight, grad_gate


# The Triton path: a program normalises BLOCK_R whole rows, so a row's sum never leaves it.


@jit("rows")
def _forward_kernel(
    x_ptr, delta_ptr, weight_ptr, gate_ptr, sum_ptr, y_ptr, scale_ptr, rows, eps,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + at, x, mask=inside)
    weight = tl.load(weight_ptr + (row % HEADS)[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.div_rn(tl.sum(x * x, axis=1), D * 1.0) + eps)
    y = x * scale[:, None] * weight
    if GATED:
        y = y * kernel_sigmoid(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(y_ptr + at, y, mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@jit("rows")
def _backward_kernel(
    x_ptr, weight_ptr, gate_ptr, scale_ptr, grad_ptr, grad_sum_ptr, grad_x_ptr, grad_gate_ptr, partial_ptr, rows,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
    ADD: tl.constexpr, GATED: tl.constexpr,
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
        grad_x = (grad - normed * mean) * scale
        if ADD:
            grad_x += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, grad_x, mask=inside)
    at = (tl.program_id(0) * HEADS + head) * D + column
    tl.store(partial_ptr + at, total, mask=column < D)


_TILE = 2048  # elements a program holds, where a row has no more
_BACKWARD_TILES = 8


def _blocks(dim: int) -> dict[str, int]:
    block = next_power_of_two(dim)
    return {"D": dim, "BLOCK_D": block, "BLOCK_R": max(1, _TILE // block), "warps": 4 if block <= _TILE else 8}


def _triton_forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads, dim = weight.shape
    rows, blocks = x.numel() // dim, _blocks(dim)
    y, scale = like(x, *x.shape), like(x, *x.shape[:-1], 1)
    total = x if delta is None else like(x, *x.shape)
    launch(
        _forward_kernel, (divide_up(rows, blocks["BLOCK_R"]),), x, x if delta is None else delta, weight,
        x if gate is None else gate, total, y, scale, rows, eps, HEADS=heads, ADD=delta is not None,
        GATED=gate is not None, **blocks,
    )  # fmt: skip
    return total, y, scale


def _triton_backward(
    x: Tensor, weight: Tensor, gate: Tensor | None, scale: Tensor, grad: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    heads, dim = weight.shape
    rows, blocks = x.numel() // dim, _blocks(dim)
    programs = divide_up(rows // heads, blocks["BLOCK_R"] * _BACKWARD_TILES)
    grad_x, partial = like(x, *x.shape), like(x, programs, heads, dim)
    grad_gate = None if gate is None else like(x, *x.shape)
    launch(
        _backward_kernel, (programs, heads), x, weight, x if gate is None else gate, scale, grad,
        grad if grad_sum is None else grad_sum, grad_x, grad_x if grad_gate is None else grad_gate, partial, rows,
        HEADS=heads, TILES=_BACKWARD_TILES, ADD=grad_sum is not None, GATED=gate is not None, **blocks,
    )  # fmt: skip
    return grad_x, partial.sum(0), grad_gate


class _RMSNorm(torch.autograd.Function):
    """Returns the sum of x and delta (x itself without one) and its norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, gate: Tensor | None, eps: float
    ) -> tuple[Tensor | None, Tensor]:
        ctx.path = choose("rms_norm", x)
        ctx.dtypes = tuple(None if each is None else each.dtype for each in (x, delta, weight, gate))
        if ctx.path is not Path.TRITON:
            x, weight = x.float(), weight.float()
        x, weight = aligned(x), aligned(weight)
        delta, gate = None if delta is None else aligned(delta), None if gate is None else aligned(gate)
        forward = _triton_forward if ctx.path is Path.TRITON else _cpu_forward
        total, y, scale = forward(x, delta, weight, gate, eps)
        ctx.save_for_backward(total, weight, gate, scale)
        ctx.set_materialize_grads(False)
        return (None if delta is None else total), y

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, gate, scale = ctx.saved_tensors
        assert grad is not None, "a norm that nobody used"
        backward = _triton_backward if ctx.path is Path.TRITON else norm_backward
        found = backward(x, weight, gate, scale, aligned(grad), None if grad_sum is None else aligned(grad_sum))
        grads = (found[0], found[0], found[1], found[2])
        return *(None if t is None or g is None else g.to(t) for g, t in zip(grads, ctx.dtypes, strict=True)), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D], or [H, D] for one per head of x [..., H, D] -> FP32 like x."""
    if choose("rms_norm", x) is Path.FAST:
        return F.rms_norm(x.float(), x.shape[-1:], None, eps) * weight.float()
    weight = weight.view(-1, x.shape[-1])
    y: Tensor = apply(_RMSNorm, x.reshape(-1, *weight.shape), None, weight, None, eps)[1]
    return y.view(x.shape)


def add_rms_norm(h: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h FP32 [T, D], delta [T, D] of any float dtype, weight [D] -> h + delta and its norm, FP32 [T, D]."""
    if choose("rms_norm", h) is Path.FAST:
        h = h + delta.float()
        return h, rms_norm(h, weight, eps)
    if not torch.is_grad_enabled() and choose("rms_norm", h) is Path.CPU:  # a decode step is full of these
        return _cpu_forward(plain(h), delta, plain(weight.unsqueeze(0)), None, eps)[:2]
    total, y = apply(_RMSNorm, h.unsqueeze(1), delta.unsqueeze(1), weight.unsqueeze(0), None, eps)
    return total.squeeze(1), y.squeeze(1)


def grouped_rms_norm_gate(x: Tensor, weight: Tensor, gate: Tensor, groups: int, eps: float) -> Tensor:
    """x, gate [..., D], weight [D], D divisible by `groups` -> FP32 [..., D]."""
    weight = weight.view(groups, -1)
    shape = (-1, *weight.shape)
    y: Tensor = apply(_RMSNorm, x.reshape(shape), None, weight, gate.reshape(shape), eps)[1]
    return y.view(x.shape)
