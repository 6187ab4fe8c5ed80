"""What lies between the QKV projection and attention: norm of q and k per head, then partial rotation (report 2.2.3).

Rotary position embedding, NeoX halves: the first R of d dimensions turn, the rest pass,

    (x_i, x_{i+R/2}) -> (x_i cos a - x_{i+R/2} sin a, x_{i+R/2} cos a + x_i sin a)

for i < R/2 and the angle a = position * theta^(-2i/R). FP32 inside (design A5).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ops.autograd import apply
from ops.compiled import ONE, compiled, f32, number, plain, share, stored
from ops.dispatch import Path, choose
from ops.jit import aligned, divide_up, jit, launch, like, next_power_of_two, tl
from ops.rms_norm import norm_backward, norm_scale, rms_norm_reference


def rope_table(
    max_positions: int, rotary_dim: int, theta: float, stretch: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """FP32 [max_positions, 2, R/2]: cosines and sines, rounded once from FP64: the same table on every machine.

    stretch: what a longer context makes of the angles per position, FP64 [R/2].
    """
    inverse = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    inverse = inverse if stretch is None else stretch(inverse)
    angles = torch.arange(max_positions, dtype=torch.float64)[:, None] * inverse
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def rope_reference(x: Tensor, position_ids: Tensor, rotary_dim: int, theta: float) -> Tensor:
    """x [T, H, d] in any float dtype; one complex rotation for each pair of dimensions."""
    half = rotary_dim // 2
    exponents = torch.arange(half, dtype=x.dtype) * 2 / rotary_dim
    angles = position_ids[:, None, None].to(x.dtype) * theta**-exponents
    turned = torch.complex(x[..., :half], x[..., half:rotary_dim]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[..., rotary_dim:]], dim=-1)


def qk_norm_rope_reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    heads: int,
    kv_heads: int,
    position_ids: Tensor,
    rotary_dim: int,
    theta: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    q, k = (x if w is None else rms_norm_reference(x, w, eps) for x, w in ((q, q_weight), (k, k_weight)))
    return rope_reference(q, position_ids, rotary_dim, theta), rope_reference(k, position_ids, rotary_dim, theta), v


# The CPU path.


@compiled
def _turn(x, factors, eps, cos, sin, normed, y):
    """One head of one token, normed where there are factors [d]; returns the scale of its norm."""
    half, scale = cos.shape[0], ONE
    if factors.shape[0] > 0:
        scale = norm_scale(x, eps)
        for d in range(x.shape[0]):
            normed[d] = number(x[d]) * scale * factors[d]
    else:
        for d in range(x.shape[0]):
            normed[d] = number(x[d])
    # Two rounded products and one sum.
    second = normed[half:]
    for d in range(half):
        y[d] = stored(normed[d] * cos[d] - second[d] * sin[d], y)
    turned = y[half:]
    for d in range(half):
        turned[d] = stored(second[d] * cos[d] + normed[d] * sin[d], y)
    for d in range(2 * half, x.shape[0]):
        y[d] = stored(normed[d], y)
    return scale


@compiled
def _cpu_kernel(begin, end, qkv, q_weight, k_weight, table, position_ids, eps, q, k, v, scale):
    """Items are tokens; the weights [d] may be empty."""
    heads, kv_heads = q.shape[1], k.shape[1]
    normed = np.empty(q.shape[2], f32)
    for token in range(begin, end):
        cos, sin = table[position_ids[token], 0], table[position_ids[token], 1]
        for head in range(heads):
            scale[token, head] = _turn(qkv[token, head], q_weight, eps, cos, sin, normed, q[token, head])
        for head in range(kv_heads):
            x, y = qkv[token, heads + head], k[token, head]
            scale[token, heads + head] = _turn(x, k_weight, eps, cos, sin, normed, y)
        for head in range(kv_heads):
            x, y = qkv[token, heads + kv_heads + head], v[token, head]
            for d in range(x.shape[0]):
                y[d] = x[d]


def _turn_back(grad: Tensor, table: Tensor, position_ids: Tensor) -> Tensor:
    """The gradient [T, H, d] of what was turned."""
    rows, half = table.index_select(0, position_ids), table.shape[2]
    cos, sin = rows[:, 0, None], rows[:, 1, None]
    first, second, y = grad[..., :half], grad[..., half : 2 * half], grad.clone()
    torch.add(first * cos, second * sin, out=y[..., :half])
    torch.sub(second * cos, first * sin, out=y[..., half : 2 * half])
    return y


class _CpuQKNormRope(torch.autograd.Function):
    """qkv [T, H + 2K, d], weights [d] or None."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int, table: Tensor,
        position_ids: Tensor, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (tokens, all_heads, dim), qkv = qkv.shape, qkv.contiguous()
        kv_heads = (all_heads - heads) // 2
        q, scale = torch.empty(tokens, heads, dim), torch.empty(tokens, heads + kv_heads)
        k, v = qkv.new_empty(2, tokens, kv_heads, dim).unbind(0)
        factors = (torch.empty(0) if weight is None else plain(weight) for weight in (q_weight, k_weight))
        share(_cpu_kernel, tokens, 12 * qkv.numel(), qkv, *factors, table, position_ids, f32(eps), q, k, v, scale)
        ctx.save_for_backward(qkv, q_weight, k_weight, table, position_ids, scale)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        qkv, *weights, table, position_ids, scale = ctx.saved_tensors
        heads, kv_heads = grad_q.shape[1], grad_k.shape[1]
        grad = _turn_back(torch.cat([grad_q, grad_k.float()], dim=1), table, position_ids)
        grad_q_weight = grad_k_weight = None
        if weights[0] is not None:
            weight = torch.cat([each.float().expand(n, -1) for each, n in zip(weights, (heads, kv_heads), strict=True)])
            grad, by_head, _ = norm_backward(
                qkv[:, : heads + kv_heads].float(), weight, None, scale.unsqueeze(-1), grad, None
            )
            grad_q_weight, grad_k_weight = (
                part.sum(0).to(each.dtype) for part, each in zip(by_head.split([heads, kv_heads]), weights, strict=True)
            )
        grad_qkv = torch.cat([grad, grad_v], dim=1).to(qkv.dtype)
        return grad_qkv, grad_q_weight, grad_k_weight, None, None, None, None


# The Triton path: a program takes BLOCK_T tokens of one head. Each value is loaded twice, once as itself and once as
# its partner in the rotation; the second load hits the cache.


@jit()
def _partners(R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns, the column each turns with, the sign of its sine, the index of its angle, and who turns at all."""
    column = tl.arange(0, BLOCK_D)
    first, turns = column < R // 2, column < R
    partner = tl.where(turns, tl.where(first, column + R // 2, column - R // 2), column)
    return column, partner, tl.where(first, -1.0, 1.0), column % (R // 2), turns & (column < D)


@jit("tokens")
def _forward_kernel(
    qkv_ptr, weight_ptr, table_ptr, position_ptr, q_ptr, k_ptr, v_ptr, tokens, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column, partner, sign, angle, turns = _partners(R, D, BLOCK_D)
    inside = (token < tokens)[:, None] & (column < D)[None, :]
    source = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head)[:, None] * D
    x = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if head >= HEADS + KV_HEADS:
        tl.store(v_ptr + (token * KV_HEADS + head - HEADS - KV_HEADS)[:, None] * D + column[None, :], x, mask=inside)
    else:
        other = tl.load(source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.div_rn(tl.sum(x * x, axis=1), D * 1.0) + eps)[:, None]
            x = x * scale * tl.load(weight_ptr + head * D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
            weight = tl.load(weight_ptr + head * D + partner, mask=column < D, other=0.0).to(tl.float32)
            other = other * scale * weight[None, :]
        position = tl.load(position_ptr + token, mask=token < tokens, other=0)
        row = table_ptr + (position * R)[:, None] + angle[None, :]
        turning = (token < tokens)[:, None] & turns[None, :]
        cos = tl.load(row, mask=turning, other=1.0)
        sin = tl.load(row + R // 2, mask=turning, other=0.0)
        y = tl.where(turning, x * cos + sign[None, :] * (other * sin), x)
        if head < HEADS:
            out = q_ptr + (token * HEADS + head)[:, None] * D + column[None, :]
        else:
            out = k_ptr + (token * KV_HEADS + head - HEADS)[:, None] * D + column[None, :]
        tl.store(out, y, mask=inside)


@jit("tokens")
def _backward_kernel(
    qkv_ptr, weight_ptr, table_ptr, position_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr, grad_ptr, partial_ptr, tokens,
    eps, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (p, head) walks TILES tiles of tokens, turns the gradient back, and sums its own part for the weight."""
    head = tl.program_id(1)
    column, partner, sign, angle, turns = _partners(R, D, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for tile in range(TILES):
        token = ((tl.program_id(0) * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = (token < tokens)[:, None] & (column < D)[None, :]
        at = (token * (HEADS + 2 * KV_HEADS) + head)[:, None] * D + column[None, :]
        if head >= HEADS + KV_HEADS:
            source = grad_v_ptr + (token * KV_HEADS + head - HEADS - KV_HEADS)[:, None] * D
            tl.store(grad_ptr + at, tl.load(source + column[None, :], mask=inside, other=0.0), mask=inside)
        else:
            if head < HEADS:
                source = grad_q_ptr + (token * HEADS + head)[:, None] * D
            else:
                source = grad_k_ptr + (token * KV_HEADS + head - HEADS)[:, None] * D
            grad = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32)
            other = tl.load(source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
            position = tl.load(position_ptr + token, mask=token < tokens, other=0)
            row = table_ptr + (position * R)[:, None] + angle[None, :]
            turning = (token < tokens)[:, None] & turns[None, :]
            cos = tl.load(row, mask=turning, other=1.0)
            sin = tl.load(row + R // 2, mask=turning, other=0.0)
            grad = tl.where(turning, grad * cos - sign[None, :] * (other * sin), grad)
            if NORM:
                x = tl.load(qkv_ptr + at, mask=inside, other=0.0).to(tl.float32)
                scale = tl.rsqrt(tl.div_rn(tl.sum(x * x, axis=1), D * 1.0) + eps)[:, None]
                normed = x * scale
                total += tl.sum(grad * normed, axis=0)
                weight = tl.load(weight_ptr + head * D + column, mask=column < D, other=0.0).to(tl.float32)
                grad = grad * weight[None, :]
                mean = tl.div_rn(tl.sum(grad * normed, axis=1), D * 1.0)[:, None]
                grad = (grad - normed * mean) * scale
            tl.store(grad_ptr + at, grad, mask=inside)
    if NORM and head < HEADS + KV_HEADS:
        at = (tl.program_id(0) * (HEADS + KV_HEADS) + head) * D + column
        tl.store(partial_ptr + at, total, mask=column < D)


_TILE = 2048  # elements a program holds
_BACKWARD_TILES = 8


class _QKNormRope(torch.autograd.Function):
    """qkv [T, H + 2K, d], weight [H + K, d] or None."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, weight: Tensor | None, heads: int, table: Tensor, position_ids: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, all_heads, dim = qkv.shape
        kv_heads, block = (all_heads - heads) // 2, next_power_of_two(dim)
        qkv, weight = aligned(qkv), None if weight is None else aligned(weight)
        ctx.sizes = {
            "HEADS": heads, "KV_HEADS": kv_heads, "D": dim, "R": 2 * table.shape[2], "NORM": weight is not None,
            "BLOCK_T": max(1, _TILE // block), "BLOCK_D": block,
        }  # fmt: skip
        ctx.eps = eps
        q, k, v = (like(qkv, tokens, count, dim, dtype=qkv.dtype) for count in (heads, kv_heads, kv_heads))
        arguments = (qkv, qkv if weight is None else weight, aligned(table), aligned(position_ids))
        grid = (divide_up(tokens, ctx.sizes["BLOCK_T"]), all_heads)
        launch(_forward_kernel, grid, *arguments, q, k, v, tokens, eps, **ctx.sizes)
        ctx.save_for_backward(*arguments)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weight, table, position_ids = ctx.saved_tensors
        tokens, all_heads, dim = qkv.shape
        programs = divide_up(tokens, ctx.sizes["BLOCK_T"] * _BACKWARD_TILES)
        grad = like(qkv, *qkv.shape, dtype=qkv.dtype)
        partial = like(qkv, programs, all_heads - ctx.sizes["KV_HEADS"], dim)
        grads = (aligned(x) for x in (grad_q, grad_k, grad_v))
        launch(
            _backward_kernel, (programs, all_heads), qkv, weight, table, position_ids, *grads, grad, partial, tokens,
            ctx.eps, TILES=_BACKWARD_TILES, **ctx.sizes,
        )  # fmt: skip
        grad_weight = partial.sum(0).to(weight.dtype) if ctx.sizes["NORM"] else None
        return grad, grad_weight, None, None, None, None


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    heads: int,
    table: Tensor,
    position_ids: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, H + 2K, d], q_weight and k_weight [d] (None: no norm), table from `rope_table`, position_ids int64 [T]
    -> q [T, H, d], k and v [T, K, d].

    k and v come in the dtype of qkv, in which they are kept; so does q on the Triton path, where attention multiplies
    in it, but on the CPU path in FP32.
    """
    if choose("qk_norm_rope", qkv) is not Path.TRITON:
        q, k, v = apply(_CpuQKNormRope, qkv, q_weight, k_weight, heads, table, position_ids, eps)
        return q, k, v
    kv_heads = (qkv.shape[1] - heads) // 2
    weight = None
    if q_weight is not None and k_weight is not None:
        weight = torch.cat([q_weight.expand(heads, -1), k_weight.expand(kv_heads, -1)])
    q, k, v = apply(_QKNormRope, qkv, weight, heads, table, position_ids, eps)
    return q, k, v
