"""Kernels for a CPU, compiled by Numba when they are first called. Private to `ops`.

Two things make their bits a function of their operands alone (design A1, A2), whatever the machine's vector width.
Floating-point rules are strict: the compiler may use vector instructions, but it neither reorders a sum nor fuses a
product with one unless `fma` is written. And threads share out whole items, so no sum crosses from one to another.

A kernel has the form `kernel(begin, end, ...)`: items begin .. end - 1 of its work, on NumPy views of tensors. Compiled
code is kept in the user's cache folder, under a digest of all sources here.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import numba
    from numba import types
    from numba.extending import intrinsic
except ImportError:
    numba = None

MIN_SHARE = 1_000_000  # operations for each thread, some 100 microseconds: waking one costs half of that
f32 = np.float32


def compiled(function: Callable[..., Any]) -> Any:
    """Decorates a kernel, or a helper that kernels call."""
    if numba is None:
        return _missing(function)
    before, folder = numba.config.CACHE_DIR, _cache_folder()
    numba.config.CACHE_DIR = folder or before
    try:
        return numba.njit(nogil=True, error_model="numpy", boundscheck=False, cache=bool(folder))(function)
    finally:
        numba.config.CACHE_DIR = before


def _missing(function: Callable[..., Any]) -> Callable[..., Any]:
    def missing(*_: Any) -> Any:
        raise RuntimeError(f"{function.__module__} on a CPU needs Numba, which is not installed: pip install numba")

    return missing


@cache
def _cache_folder() -> str:
    """Numba looks at a kernel's own file only when it asks whether kept code is stale, hence a folder for all sources,
    in NUMBA_CACHE_DIR or the user's cache. Empty where none can be made."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep" / "kernels"
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or home) / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(folder)


def share(kernel: Any, items: int, operations: int, *arguments: Any) -> None:
    """Runs `kernel(begin, end, *arguments)` over all items, on as many of torch's threads as are worth waking.

    operations: about how many floating-point operations all items take. Tensors arrive as arrays (`array`).
    """
    arrays = [array(x) if isinstance(x, Tensor) else x for x in arguments]
    parts = max(1, min(torch.get_num_threads(), items, operations // MIN_SHARE))
    bounds = [items * part // parts for part in range(parts + 1)]
    waiting = [_threads(parts - 1).submit(kernel, bounds[i], bounds[i + 1], *arrays) for i in range(1, parts)]
    kernel(0, bounds[1], *arrays)
    for other in waiting:
        other.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="ops")


def array(x: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on a CPU."""
    assert x.is_contiguous(), "kernels are compiled for contiguous arrays"
    return (x.detach() if x.requires_grad else x).numpy()


def plain(x: Tensor) -> Tensor:
    """x in FP32 and contiguous, as kernels read it."""
    return x.float().contiguous()


if numba is not None:
    # What Numba has no name for: each is one instruction.

    @intrinsic
    def fma(_, a, b, c):
        """a * b + c, rounded once."""
        signature = types.float32(types.float32, types.float32, types.float32)
        return signature, lambda context, builder, signature, args: builder.fma(*args)

    @intrinsic
    def _bits(_, x):
        def generate(context, builder, signature, args):
            return builder.bitcast(args[0], context.get_value_type(types.int32))

        return types.int32(types.float32), generate

    @intrinsic
    def _number(_, bits):
        def generate(context, builder, signature, args):
            return builder.bitcast(args[0], context.get_value_type(types.float32))

        return types.float32(types.int32), generate


ZERO, ONE = f32(0.0), f32(1.0)
_LOG2_E, _ROUND = f32(1.4426950408889634), f32(1.5 * 2.0**23)  # x + _ROUND - _ROUND is x rounded to a whole number
_LN2_HIGH, _LN2_LOW = f32(-0.693359375), f32(2.12194440e-4)  # -ln 2 in two parts, the first exact in 10 bits
_LEAST, _LARGEST = f32(-87.33654), f32(88.0)  # below, exp is no normal number
# exp(r) = 1 + r + r^2 (polynomial) for |r| <= ln 2 / 2: Cephes' expf.
_E0, _E1, _E2 = f32(1.9875691500e-4), f32(1.3981999507e-3), f32(8.3334519073e-3)
_E3, _E4, _E5 = f32(4.1665795894e-2), f32(1.6666665459e-1), f32(5.0000001201e-1)
_INFINITY = f32(np.inf)


@compiled
def exp(x):
    """e^x in FP32, within 1.5 units in the last place; 0 where that is no normal number, infinity above 88."""
    y = x if x > _LEAST else _LEAST
    y = y if y < _LARGEST else _LARGEST
    shifted = fma(y, _LOG2_E, _ROUND)
    power = shifted - _ROUND
    r = fma(power, _LN2_LOW, fma(power, _LN2_HIGH, y))
    p = fma(fma(fma(fma(fma(_E0, r, _E1), r, _E2), r, _E3), r, _E4), r, _E5)
    p = fma(p, r * r, r) + ONE
    # The last bits of `shifted` are the power of two, which is added to the exponent.
    scale = _number(np.int32((_bits(shifted) << np.int32(23)) + np.int32(0x3F800000)))
    result = p * scale if x >= _LEAST else ZERO
    result = _INFINITY if x > _LARGEST else result
    return result if x == x else x


@compiled
def sigmoid(x):
    return ONE / (ONE + exp(-x))


@compiled
def largest(x, count, lanes):
    """Of the first `count` >= 1 numbers; NaN counts as nothing unless it is the first."""
    width = lanes.shape[0]
    lanes[:] = x[0]
    whole = count - count % width
    for i in range(0, whole, width):
        part = x[i : i + width]
        for lane in range(width):
            lanes[lane] = part[lane] if part[lane] > lanes[lane] else lanes[lane]
    top = lanes[0]
    for lane in range(1, width):
        top = lanes[lane] if lanes[lane] > top else top
    for i in range(whole, count):
        top = x[i] if x[i] > top else top
    return top


@compiled
def sum_lanes(lanes):
    """Partial sums, added in order. Of L, number i % L takes term i: so vector instructions can add."""
    total = lanes[0]
    for lane in range(1, lanes.shape[0]):
        total += lanes[lane]
    return total


@compiled
def add_weighted(weights, rows, count, out):
    """out [d] += the first `count` weights times rows [count, d], in order."""
    whole = count - count % 4
    for j in range(0, whole, 4):
        w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        r0, r1, r2, r3 = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
        for e in range(out.shape[0]):
            out[e] = fma(w3, r3[e], fma(w2, r2[e], fma(w1, r1[e], fma(w0, r0[e], out[e]))))
    for j in range(whole, count):
        w, row = weights[j], rows[j]
        for e in range(out.shape[0]):
            out[e] = fma(w, row[e], out[e])
