"""Cases of the experts of Ring-mini-linear: 256 of width 512 at D 2048, 8 to a token; in training and in decode."""

from collections.abc import Callable

import torch
from torch import Tensor

import ops
from benchmarks.operators.case import NVIDIA_TARGETS, Case, backward, empty, rows_at

TARGETS = NVIDIA_TARGETS  # a gfx942 has too little shared memory for tiles of 128 x 64
EXPERTS, WIDTH, D, TOP_K = 256, 512, 2048, 8


def _ids(tokens: int, device: torch.device) -> Tensor:
    """Ascending and evenly spread, the same each time."""
    first = torch.arange(tokens, device=device)[:, None] * 37
    ids: Tensor = ((first + torch.arange(TOP_K, device=device) * 32) % EXPERTS).sort(dim=1).values
    return ids


def _inputs(tokens: int) -> Callable[[torch.device], tuple[object, ...]]:
    def make(device: torch.device) -> tuple[object, ...]:
        gate_up, down = (
            empty(EXPERTS, 2 * WIDTH, D, dtype=torch.bfloat16),
            empty(EXPERTS, D, WIDTH, dtype=torch.bfloat16),
        )
        return (
            empty(tokens, D)(device),
            gate_up(device),
            down(device),
            _ids(tokens, device),
            empty(tokens, TOP_K)(device),
        )

    return make


def _fp8_inputs(tokens: int) -> Callable[[torch.device], tuple[object, ...]]:
    def make(device: torch.device) -> tuple[object, ...]:
        gate_up, down = (
            empty(EXPERTS * 2 * WIDTH, D, dtype=torch.bfloat16),
            empty(EXPERTS * D, WIDTH, dtype=torch.bfloat16),
        )
        weights = ops.quantize_weight(gate_up(device)), ops.quantize_weight(down(device))
        return empty(tokens, D)(device), *weights, _ids(tokens, device), empty(tokens, TOP_K)(device)

    return make


def _experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return ops.experts(x, gate_up, down, ids, weights, torch.bfloat16)


def _fp8_experts(x: Tensor, gate_up: ops.Fp8Weight, down: ops.Fp8Weight, ids: Tensor, weights: Tensor) -> Tensor:
    return ops.fp8_experts(x, gate_up, down, ids, weights, EXPERTS)


def _loop() -> Callable[..., object]:
    def run(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y, x = torch.zeros_like(x), x.bfloat16()
        for expert in range(EXPERTS):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate, up = (x[token] @ gate_up[expert].t()).chunk(2, dim=-1)
            rows = (torch.nn.functional.silu(gate) * up) @ down[expert].t()
            y.index_add_(0, token, rows.float() * weights[token, slot, None])
        return y

    return run


def _bytes(tokens: int, itemsize: int) -> float:
    used = min(EXPERTS, tokens * TOP_K)
    return used * 3.0 * WIDTH * D * itemsize + tokens * D * (4 + TOP_K * 4 + 4.0)


def _flops(tokens: int) -> float:
    return 6.0 * tokens * TOP_K * WIDTH * D


CASES = [
    *(
        Case(
            "experts", "forward", f"T{tokens} E256 k8 F512 D2048", _inputs(tokens), _experts, _bytes(tokens, 2),
            _flops(tokens), peers={"torch, expert by expert": _loop}, rows=rows_at(tokens, 0, 3, 4),
        )
        for tokens in (8192, 64)
    ),
    Case("experts", "both", "T8192 E256 k8 F512 D2048", _inputs(8192), backward(_experts), flops=3 * _flops(8192)),
]  # fmt: skip

CASES += [
    Case(
        "experts", "FP8 forward", f"T{tokens} E256 k8 F512 D2048", _fp8_inputs(tokens), _fp8_experts,
        _bytes(tokens, 1), _flops(tokens), "float8", rows=rows_at(tokens, 0, 3, 4),
    )
    for tokens in (8192, 64)
]  # fmt: skip
