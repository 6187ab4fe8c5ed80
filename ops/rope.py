"""Partial rotary position embedding, NeoX halves: the first R of d dimensions turn, the rest pass (report 2.2.3).

    (x_i, x_{i+R/2}) -> (x_i cos a - x_{i+R/2} sin a, x_{i+R/2} cos a + x_i sin a)

for i < R/2 and the angle a = position * theta^(-2i/R). FP32 throughout (design A5).
"""

from typing import Any

import torch
from torch import Tensor


def rope_table(max_positions: int, rotary_dim: int, theta: float) -> Tensor:
    """FP32 [max_positions, 2, R/2]: cosines and sines, rounded once from FP64: the same table on every machine."""
    inverse = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(max_positions, dtype=torch.float64)[:, None] * inverse
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def rope_reference(x: Tensor, position_ids: Tensor, rotary_dim: int, theta: float) -> Tensor:
    """x [T, H, d] in any float dtype; one complex rotation for each pair of dimensions."""
    half = rotary_dim // 2
    exponents = torch.arange(half, dtype=x.dtype) * 2 / rotary_dim
    angles = position_ids[:, None, None].to(x.dtype) * theta**-exponents
    turned = torch.complex(x[..., :half], x[..., half:rotary_dim]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[..., rotary_dim:]], dim=-1)


def rope(x: Tensor, table: Tensor, position_ids: Tensor) -> Tensor:
    """x FP32 [T, H, d], table from `rope_table`, position_ids int64 [T] -> FP32 [T, H, d]."""
    rows = table.index_select(0, position_ids)
    y: Tensor = _Rope.apply(x, rows[:, 0, None], rows[:, 1, None])
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    y = x.clone()
    # Two rounded products and one sum, never a fused multiply-add: the same bits for any memory layout.
    torch.sub(first * cos, second * sin, out=y[..., :half])
    torch.add(second * cos, first * sin, out=y[..., half : 2 * half])
    return y
