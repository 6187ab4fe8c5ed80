"""Cases of the router of Ring-mini-linear: 256 experts in 8 groups, 8 of 4 groups chosen."""

from collections.abc import Callable

import torch

import ops
from benchmarks.operators.case import Case, backward, empty, rows_at

EXPERTS, SETTINGS = 256, (8, 8, 4, 2.5)


def _route(logits: torch.Tensor, bias: torch.Tensor) -> object:
    return ops.route(logits, bias, *SETTINGS)


def _weights(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return ops.route(logits, bias.detach(), *SETTINGS)[1]


def _replayed(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Weights of experts that are given, as in routing replay."""
    ids = torch.arange(8, device=logits.device).expand(len(logits), 8).contiguous()
    return ops.expert_weights(logits, ids, SETTINGS[-1])


def _inputs(tokens: int) -> Callable[[torch.device], tuple[object, ...]]:
    return lambda device: (empty(tokens, EXPERTS)(device), empty(EXPERTS)(device))


CASES = [
    *(
        Case(
            "router", "forward", f"T{tokens} E256 k8", _inputs(tokens), _route,
            bytes=tokens * (EXPERTS * 4 + 8 * 12.0), rows=rows_at(tokens, 0),
        )
        for tokens in (8192, 64)
    ),
    Case("router", "replay", "T8192 E256 k8", _inputs(8192), _replayed, bytes=8192 * (EXPERTS * 4 + 8 * 12.0)),
    Case("router", "both", "T8192 E256 k8", _inputs(8192), backward(_weights), bytes=8192 * (EXPERTS * 12 + 8 * 24.0)),
]  # fmt: skip
