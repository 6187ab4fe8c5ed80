"""Cases of RMSNorm at the widths of Ring-mini-linear: D 2048, 16 heads of 128, 4 groups of 512."""

from collections.abc import Callable

import torch

import ops
from benchmarks.operators.case import Case, backward, empty, rows_at

TOKENS, D = 8192, 2048
EPS = 1e-6


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ops.rms_norm(x, weight, EPS)


def _gate(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return ops.grouped_rms_norm_gate(x, weight, gate, 4, EPS)


def _torch() -> Callable[..., object]:
    return lambda x, weight: torch.nn.functional.rms_norm(x, (D,), weight, EPS)


def _norm_inputs(device: torch.device) -> tuple[object, ...]:
    return empty(TOKENS, D)(device), empty(D)(device)


def _gate_inputs(device: torch.device) -> tuple[object, ...]:
    return empty(TOKENS, D)(device), empty(D)(device), empty(TOKENS, D, dtype=torch.bfloat16)(device)


CASES = [
    Case(
        "rms_norm", "forward", "T8192 D2048", _norm_inputs, _norm, bytes=TOKENS * D * 8, peers={"torch": _torch},
        rows=rows_at(TOKENS, 0),
    ),
    Case("rms_norm", "forward and backward", "T8192 D2048", _norm_inputs, backward(_norm), bytes=TOKENS * D * 28),
    Case(
        "rms_norm", "gated forward", "T8192 G4x512", _gate_inputs, _gate, bytes=TOKENS * D * 10,
        rows=rows_at(TOKENS, 0, 2),
    ),
    Case("rms_norm", "gated both", "T8192 G4x512", _gate_inputs, backward(_gate), bytes=TOKENS * D * 36),
]  # fmt: skip
