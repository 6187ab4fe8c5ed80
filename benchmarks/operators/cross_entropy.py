"""Cases of the fused cross-entropy of Ring-mini-linear: D 2048, V 157184, 8192 tokens; loss and gradients.

Logits are one product, and so is each gradient.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operators.case import NVIDIA_TARGETS, Case, backward, empty
from ops.cross_entropy import cross_entropy

T, D, V = 8192, 2048, 157184
TARGETS = NVIDIA_TARGETS  # a gfx942 has too little shared memory for a tile of the head


def _inputs(dtype: torch.dtype, weight: torch.dtype, rows: int = T) -> Callable[[torch.device], tuple[object, ...]]:
    def make(device: torch.device) -> tuple[object, ...]:
        targets = torch.zeros(rows, dtype=torch.long).to(device)
        row_weights = torch.full((rows,), 1 / rows).to(device)
        return empty(rows, D)(device), empty(V, D, dtype=weight)(device), targets, row_weights, dtype

    return make


def _torch() -> Callable[..., object]:
    def run(hidden: Tensor, weight: Tensor, targets: Tensor, *_: object) -> Tensor:
        return F.cross_entropy(F.linear(hidden.to(weight.dtype), weight).float(), targets)

    return backward(run)


def _liger() -> Callable[..., object]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, *_: object) -> Tensor:
        loss: Tensor = liger_fused_linear_cross_entropy(hidden.to(weight.dtype), weight, targets)
        return loss

    return backward(run)


def _fla() -> Callable[..., object]:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, *_: object) -> Tensor:
        loss: Tensor = fused_linear_cross_entropy_loss(hidden.to(weight.dtype), targets, weight)
        return loss

    return backward(run)


CASES = [
    Case(
        "cross_entropy", "loss and gradients", f"T{T} D{D} V{V}", _inputs(torch.bfloat16, torch.bfloat16),
        backward(cross_entropy), bytes=8.0 * T * D + 6.0 * V * D, flops=6.0 * T * D * V,
        peers={"liger": _liger, "fla": _fla, "torch": _torch},
    ),
    Case(
        "cross_entropy", "from FP32 masters", f"T{T} D{D} V{V}", _inputs(torch.bfloat16, torch.float32),
        backward(cross_entropy), bytes=8.0 * T * D + 8.0 * V * D, flops=6.0 * T * D * V,
    ),
    Case(
        "cross_entropy", "all FP32", f"T256 D{D} V{V}", _inputs(torch.float32, torch.float32, 256),
        backward(cross_entropy), flops=6.0 * 256 * D * V, dtype="float32", peers={"torch": _torch},
    ),
]  # fmt: skip
