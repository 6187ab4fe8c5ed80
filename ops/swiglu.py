"""SwiGLU: y = silu(gate) * up with silu(g) = g * sigmoid(g) (Shazeer 2020, 2002.05202), computed in FP32.

gate_up [..., 2F] holds gate then up; y [..., F] in the dtype of gate_up.
"""

from typing import Any

import torch
from torch import Tensor

from ops.elementwise import sigmoid


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F] -> [..., F]."""
    y: Tensor = _SwiGLU.apply(gate_up)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
        return sigmoid(gate).mul_(gate).mul_(up).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
        s, grad, half = sigmoid(gate), grad.float(), gate.shape[-1]
        silu = gate * s
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate_up[..., :half] = torch.rsub(s, 1.0).mul_(silu).add_(s).mul_(up).mul_(grad)
        grad_gate_up[..., half:] = silu.mul_(grad)
        return grad_gate_up
