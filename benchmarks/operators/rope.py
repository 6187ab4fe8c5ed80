"""Cases of qk_norm_rope at the widths of Ring-mini-linear: heads of 128, half of each turning."""

from collections.abc import Callable

import torch

import ops
from benchmarks.operators.case import Case, backward, empty, rows_at

TOKENS, DIM = 8192, 128
EPS = 1e-6


def _turn(heads: int) -> Callable[..., torch.Tensor]:
    def run(
        qkv: torch.Tensor, q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = ops.qk_norm_rope(qkv, q, k, heads, table.detach(), positions, EPS)
        return torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1)

    return run


def _forward(heads: int) -> Callable[..., object]:
    return lambda *arguments: ops.qk_norm_rope(*arguments[:3], heads, *arguments[3:], EPS)


def _inputs(heads: int, kv_heads: int) -> Callable[[torch.device], tuple[object, ...]]:
    def make(device: torch.device) -> tuple[object, ...]:
        qkv = empty(TOKENS, heads + 2 * kv_heads, DIM, dtype=torch.bfloat16)(device)
        table = ops.rope_table(TOKENS, DIM // 2, 1e6).to(device)
        return qkv, empty(DIM)(device), empty(DIM)(device), table, torch.arange(TOKENS, device=device)

    return make


def _bytes(heads: int, kv_heads: int) -> float:
    return TOKENS * (heads + 2 * kv_heads) * DIM * 2 * 2


CASES = [
    *(
        Case(
            "rope", "forward", f"T8192 H16 K{kv_heads} d128", _inputs(16, kv_heads), _forward(16),
            bytes=_bytes(16, kv_heads), rows=rows_at(TOKENS, 0, 4),
        )
        for kv_heads in (16, 4)
    ),
    Case("rope", "both", "T8192 H16 K16 d128", _inputs(16, 16), backward(_turn(16)), bytes=5 * _bytes(16, 16) / 2),
]  # fmt: skip
