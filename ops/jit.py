"""Triton where it is installed; without it the kernels below stay plain functions that nobody calls. Private to `ops`.

Three rules hold for every launch, because bits depend on them. Floating-point contraction is off: whether a * b + c
rounds once or twice would otherwise follow from the code around it, and differ between two kernels that share a helper.
Counts of rows are named in `do_not_specialize`: one binary serves every batch. Tile sizes and warps come from the
operator's widths, never from the rows.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = SimpleNamespace(constexpr=object)


ALIGNMENT = 16  # bytes; Triton compiles another binary for a pointer that is not a multiple of it


def jit(*rows: str) -> Callable[[Callable[..., None]], Any]:
    """Decorates a kernel; `rows` names the integer arguments that vary with the batch."""

    def decorate(function: Callable[..., None]) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=list(rows))

    return decorate


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Runs `kernel` over `grid`; constants are its `tl.constexpr` parameters."""
    assert triton is not None, "Triton is not installed, yet its path was chosen"
    assert all(x.data_ptr() % ALIGNMENT == 0 for x in arguments if isinstance(x, Tensor)), "see aligned()"
    if all(grid):
        kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=False)


def next_power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def divide_up(value: int, divisor: int) -> int:
    return -(-value // divisor)


def triton_dtype(dtype: torch.dtype) -> Any:
    """The kernel-side name of a matrix operand type."""
    return {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float8_e4m3fn: tl.float8e4nv}[dtype]


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and at an address that kernels are compiled for."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def like(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised memory beside x: every kernel writes all that is read later."""
    return torch.empty(shape, dtype=dtype, device=x.device)
