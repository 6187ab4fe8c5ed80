"""Kernels with one fault each, which the compile check must find; one case for a fault. Nobody runs them."""

import torch
from torch import Tensor

from benchmarks.operators.case import Arguments, Case, empty, rows_at
from ops.jit import aligned, jit, launch, tl

ROWS = 4096


@jit("rows")
def sound(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.div_rn(1.0, tl.load(x_ptr + at, mask=at < rows, other=1.0)), mask=at < rows)


@jit("rows")
def divides(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 1.0 / tl.load(x_ptr + at, mask=at < rows, other=1.0), mask=at < rows)


@jit()
def counts_rows(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < rows, other=1.0), mask=at < rows)


@jit("rows")
def adds_by_chance(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + at, mask=at < rows, other=0.0)))


@jit("rows")
def multiplies(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    """In TF32, which is what Triton does with FP32 unless it is told otherwise."""
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x))


@jit("rows")
def spills(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    """512 numbers for each of 32 threads."""
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x - tl.max(x, axis=1)[:, None] - tl.max(x, axis=0)[None, :])


def _launch(kernel: object, block: int = 128, warps: int = 4) -> object:
    def run(x: Tensor) -> None:
        launch(kernel, (1,), aligned(x), torch.empty_like(x), len(x), BLOCK=block, warps=warps)

    return run


def _tile_by_rows(x: Tensor) -> None:
    launch(sound, (1,), aligned(x), torch.empty_like(x), len(x), BLOCK=256 if len(x) > 100 else 64)


def _misaligned(x: Tensor) -> None:
    """Past `launch`, which would not allow it."""
    for shift in (0, 1):
        sound[(1,)](x[shift:], torch.empty_like(x), len(x), BLOCK=512, num_warps=4, num_stages=2)


def _inputs(device: torch.device) -> Arguments:
    return (empty(ROWS)(device),)


def _case(name: str, run: object) -> Case:
    return Case("planted", name, f"T{ROWS}", _inputs, run, rows=rows_at(ROWS, 0))


CASES = [
    _case("sound", _launch(sound)),
    _case("divides", _launch(divides)),
    _case("counts rows", _launch(counts_rows)),
    _case("adds by chance", _launch(adds_by_chance)),
    _case("multiplies", _launch(multiplies)),
    _case("spills", _launch(spills, warps=1)),
    _case("tile by rows", _tile_by_rows),
    _case("misaligned", _misaligned),
]
