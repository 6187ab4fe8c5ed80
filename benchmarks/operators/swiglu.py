"""Cases of SwiGLU at the widths of Ring-mini-linear: dense 5120, an expert 512 for each of 8 x 8192 assignments."""

from collections.abc import Callable

import torch

import ops
from benchmarks.operators.case import Case, backward, empty, rows_at


def _inputs(rows: int, width: int) -> Callable[[torch.device], tuple[object, ...]]:
    return lambda device: (empty(rows, 2 * width, dtype=torch.bfloat16)(device),)


def _torch() -> Callable[..., object]:
    def run(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    return run


def _case(name: str, run: Callable[..., object], rows: int, width: int, values: int) -> Case:
    return Case(
        "swiglu", name, f"T{rows} F{width}", _inputs(rows, width), run, bytes=2.0 * rows * width * values,
        peers={"torch": _torch}, rows=rows_at(rows, 0),
    )  # fmt: skip


CASES = [
    _case("forward", ops.swiglu, 8192, 5120, 3),
    _case("forward", ops.swiglu, 65536, 512, 3),
    Case("swiglu", "both", "T8192 F5120", _inputs(8192, 5120), backward(ops.swiglu), bytes=2.0 * 8192 * 5120 * 8),
]
