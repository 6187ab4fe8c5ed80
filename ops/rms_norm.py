"""RMSNorm, and the grouped RMSNorm with a sigmoid gate that closes a Ring-linear attention layer (report 2.2.3).

    rms_norm(x)            = x * rsqrt(mean(x^2) + eps) * w                      over the last dimension
    grouped_rms_norm_gate  = rms_norm over each of G equal groups of channels, times w, times sigmoid(gate)

Inputs of any float dtype, FP32 inside and out (design A5); weight [D] is per channel in both.
"""

from typing import Any

import torch
from torch import Tensor

from ops.elementwise import sigmoid


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def grouped_rms_norm_gate_reference(x: Tensor, weight: Tensor, gate: Tensor, groups: int, eps: float) -> Tensor:
    grouped = x.unflatten(-1, (groups, -1))
    return rms_norm_reference(grouped, weight.view(groups, -1), eps).flatten(-2) * torch.sigmoid(gate)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight broadcastable to x's last dimensions ([D], or [H, D] for one per head) -> FP32 like x."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


def grouped_rms_norm_gate(x: Tensor, weight: Tensor, gate: Tensor, groups: int, eps: float) -> Tensor:
    """x, gate [..., D], weight [D], D divisible by `groups` -> FP32 [..., D]."""
    normed = rms_norm(x.unflatten(-1, (groups, -1)), weight.view(groups, -1), eps).flatten(-2)
    y: Tensor = _SigmoidGate.apply(normed, gate)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.float().contiguous()
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        normed = x * scale
        grad_weight = (grad * normed).sum_to_size(weight.shape).to(weight.dtype)
        grad = grad * weight.float()
        mean = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(mean)).mul_(scale), grad_weight, None


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        s = sigmoid(gate.float())
        ctx.save_for_backward(x, s)
        ctx.gate_dtype = gate.dtype
        return x * s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, s = ctx.saved_tensors
        return grad * s, (grad * x).mul_(s).mul_(1.0 - s).to(ctx.gate_dtype)
