"""Cases of the linear layers of Ring-mini-linear (D 2048) and Ring-flash-linear (D 4096): N x K of each weight.

Training has 8192 rows, decode 64 or 1. The router multiplies FP32 activations with BF16 weights as FP32 numbers.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.operators.case import NVIDIA_TARGETS, Case, backward, empty, rows_at
from ops.linear import fp32_linear, linear

TARGETS = NVIDIA_TARGETS  # a gfx942 has too little shared memory for the tiles
BF16 = torch.bfloat16
TRAINING, DECODE = 8192, (64, 1)
QKV, ROUTER = (6144, 2048), (256, 2048)
MINI = (QKV, (2048, 2048), (10240, 2048), (2048, 5120))  # QKV; dense and gate; gate and up; down
FLASH = ((12288, 4096), (4096, 9216))  # QKV; down


def _inputs(
    rows: int, width: int, inner: int, x: torch.dtype, weight: torch.dtype
) -> Callable[[torch.device], tuple[object, ...]]:
    return lambda device: (empty(rows, inner, dtype=x)(device), empty(width, inner, dtype=weight)(device))


def _torch() -> Callable[..., object]:
    return F.linear


def _cpu_both() -> Callable[..., object]:
    return backward(F.linear)


def _cpu_fp32() -> Callable[..., object]:
    return lambda x, weight: F.linear(x, weight.float())


def _case(name: str, run: Callable[..., object], rows: int, weight: tuple[int, int], products: int = 1) -> Case:
    """Operands and result in BF16; products: 1 forward, 3 with backward."""
    width, inner = weight
    moved = 2.0 * (rows * inner + rows * width + width * inner)
    peer = _torch if products == 1 else _cpu_both
    return Case(
        "linear", name, f"T{rows} {width}x{inner}", _inputs(rows, width, inner, BF16, BF16), run,
        bytes=moved * products, flops=2.0 * products * rows * width * inner, peers={"torch": peer},
        rows=rows_at(rows, 0) if products == 1 else None,
    )  # fmt: skip


def _router(name: str, run: Callable[..., object], rows: int, products: int = 1) -> Case:
    width, inner = ROUTER
    moved = 4.0 * rows * (inner + width) + 2.0 * width * inner
    return Case(
        "linear", name, f"T{rows} {width}x{inner}", _inputs(rows, width, inner, torch.float32, BF16), run,
        bytes=moved * products, flops=6.0 * products * rows * width * inner,
        peers={"torch": _cpu_fp32} if products == 1 else {}, rows=rows_at(rows, 0) if products == 1 else None,
    )  # fmt: skip


_linear = partial(linear, dtype=BF16)
_fp32_linear = partial(fp32_linear, dtype=BF16)

MASTERS = Case(
    "linear", "from FP32 masters, both", "T8192 6144x2048", _inputs(TRAINING, *QKV, torch.float32, torch.float32),
    backward(_linear), bytes=14.0 * TRAINING * sum(QKV), flops=6.0 * TRAINING * QKV[0] * QKV[1],
)  # fmt: skip
ALL_FP32 = Case(
    "linear", "all FP32, both", "T8192 2048x2048", _inputs(TRAINING, 2048, 2048, torch.float32, torch.float32),
    backward(partial(linear, dtype=torch.float32)), flops=6.0 * TRAINING * 2048 * 2048, dtype="float32",
    peers={"torch": _cpu_both},
)  # fmt: skip

CASES = [
    *(_case("forward", _linear, TRAINING, weight) for weight in MINI + FLASH),
    *(_case("forward and backward", backward(_linear), TRAINING, weight, products=3) for weight in MINI + FLASH),
    *(_case("decode", _linear, rows, weight) for weight in MINI + FLASH for rows in DECODE),
    _router("FP32 forward", _fp32_linear, TRAINING),
    _router("FP32 forward and backward", backward(_fp32_linear), TRAINING, products=3),
    *(_router("FP32 decode", _fp32_linear, rows) for rows in DECODE),
    MASTERS,
    ALL_FP32,
]
