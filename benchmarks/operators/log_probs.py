"""Cases of the language-model head of Ring-mini-linear: D 2048, V 157184. Training has 8192 rows, a check 16.

Forward is one product; backward repeats it and has one for each gradient.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operators.case import NVIDIA_TARGETS, Case, backward, empty, rows_at
from ops.log_probs import full_log_probs, log_probs

T, D, V = 8192, 2048, 157184
BF16 = torch.bfloat16
PRODUCT = 2.0 * T * D * V
TARGETS = NVIDIA_TARGETS  # a gfx942 has too little shared memory for a tile of the head


def _log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype = BF16) -> Tensor:
    return log_probs(hidden, weight, targets, 1.0, dtype)[0]


def _cpu_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden.to(weight.dtype), weight).float(), targets, reduction="none")


def _torch() -> Callable[..., object]:
    return _cpu_log_probs


def _cpu_both() -> Callable[..., object]:
    return backward(_cpu_log_probs)


def _linghe() -> Callable[..., object]:
    from linghe.facade.loss import softmax_cross_entropy

    return lambda hidden, weight, targets: -softmax_cross_entropy(F.linear(hidden.to(weight.dtype), weight), targets)


def _inputs(rows: int, weight: torch.dtype) -> Callable[[torch.device], tuple[object, ...]]:
    def make(device: torch.device) -> tuple[object, ...]:
        return empty(rows, D)(device), empty(V, D, dtype=weight)(device), torch.zeros(rows, dtype=torch.long).to(device)

    return make


def _full_inputs(device: torch.device) -> tuple[object, ...]:
    return empty(16, D)(device), empty(V, D, dtype=BF16)(device), 1.0, BF16


def _cpu_full() -> Callable[..., object]:
    return lambda hidden, weight, *_: torch.log_softmax(F.linear(hidden.to(weight.dtype), weight).float(), dim=-1)


CASES = [
    Case(
        "log_probs", "forward", f"T{T} D{D} V{V}", _inputs(T, BF16), _log_probs, bytes=4.0 * T * D + 2.0 * V * D,
        flops=PRODUCT, peers={"torch": _torch, "linghe": _linghe}, rows=rows_at(T, 0, 2),
    ),
    Case(
        "log_probs", "forward and backward", f"T{T} D{D} V{V}", _inputs(T, BF16), backward(_log_probs),
        bytes=12.0 * T * D + 6.0 * V * D, flops=4 * PRODUCT, peers={"torch": _cpu_both},
    ),
    Case(
        "log_probs", "from FP32 masters, both", f"T{T} D{D} V{V}", _inputs(T, torch.float32), backward(_log_probs),
        bytes=12.0 * T * D + 12.0 * V * D, flops=4 * PRODUCT,
    ),
    Case(
        "log_probs", "all FP32, both", f"T256 D{D} V{V}", _inputs(256, torch.float32),
        backward(partial(_log_probs, dtype=torch.float32)), flops=4 * PRODUCT * 256 / T, dtype="float32",
        peers={"torch": _cpu_both},
    ),
    Case(
        "log_probs", "full rows", f"T16 D{D} V{V}", _full_inputs, full_log_probs, bytes=2.0 * V * D + 4.0 * 16 * V,
        flops=PRODUCT * 16 / T, peers={"torch": _cpu_full}, rows=rows_at(16, 0),
    ),
]  # fmt: skip
