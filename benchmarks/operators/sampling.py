"""Cases of the sampler of Ring-mini-linear: D 2048, V 157184, a decode step of 64 sequences or of one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operators.case import NVIDIA_TARGETS, Case, empty, rows_at
from ops.sampling import sample

D, V = 2048, 157184
BF16 = torch.bfloat16
TARGETS = NVIDIA_TARGETS  # a gfx942 has too little shared memory for a tile of the head


def _inputs(rows: int, temperature: float, top_p: float) -> Callable[[torch.device], tuple[object, ...]]:
    def make(device: torch.device) -> tuple[object, ...]:
        settings = torch.tensor([temperature, top_p, 0.0, 0.0]).expand(rows, 4).t().contiguous().to(device)
        hidden, weight = empty(rows, D)(device), empty(V, D, dtype=BF16)(device)
        uniform = torch.linspace(0, 0.999, rows, dtype=torch.float64).to(device)
        return hidden, weight, settings[0], settings[1], settings[2].long(), settings[3], uniform, BF16

    return make


def _torch() -> Callable[..., object]:
    def run(hidden: Tensor, weight: Tensor, temperature: Tensor, *_: object) -> Tensor:
        logits = F.linear(hidden.to(weight.dtype), weight).float() / temperature[:, None]
        return torch.multinomial(torch.softmax(logits, dim=-1), 1)

    return run


def _cpu_greedy() -> Callable[..., object]:
    return lambda hidden, weight, *_: F.linear(hidden.to(weight.dtype), weight).argmax(dim=-1)


def _flashinfer() -> Callable[..., object]:
    from flashinfer.sampling import top_p_sampling_from_probs

    def run(hidden: Tensor, weight: Tensor, temperature: Tensor, top_p: Tensor, *_: object) -> Tensor:
        logits = F.linear(hidden.to(weight.dtype), weight).float() / temperature[:, None]
        tokens: Tensor = top_p_sampling_from_probs(torch.softmax(logits, dim=-1), top_p)
        return tokens

    return run


def _case(
    name: str, rows: int, peers: dict[str, Callable[[], Callable[..., object]]], temperature: float = 1.0,
    top_p: float = 1.0,
) -> Case:  # fmt: skip
    return Case(
        "sampling", name, f"B{rows} D{D} V{V}", _inputs(rows, temperature, top_p), sample,
        bytes=2.0 * V * D + 4.0 * rows * V, flops=2.0 * rows * V * D, peers=peers, rows=rows_at(rows, 0, 2, 3, 4, 5, 6),
    )  # fmt: skip


CASES = [
    _case("decode", 64, {"torch": _torch}),
    _case("decode", 1, {"torch": _torch}),
    _case("decode, top-p 0.95", 64, {"flashinfer": _flashinfer}, top_p=0.95),
    _case("decode, greedy", 64, {"torch": _cpu_greedy}, temperature=0.0),
]
