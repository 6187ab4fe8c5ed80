"""Products of BF16 matrices on a CPU with AMX: y = x W^T in FP32, rounded once. Private to `ops`.

The library's own product cuts a sum differently for every number of rows and threads. Here an element's sum runs over K
in steps of 32 into one FP32 accumulator, whatever is computed beside it (design A1, A2), and W is laid out once for the
tile unit: Intel 64 manual, TDPBF16PS. A thread computes 32 columns at a time, 32 rows by 32 columns in four tiles.

FP32 rows, for the LM head, are sums of three BF16 terms (`split`), which keep all 24 bits; a step adds the products of
the smallest term first.

Letters: M rows, N and K out and in features, as in y [M, N] = x [M, K] W [N, K]^T.
"""

import ctypes
import platform
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.compiled import compiled, f32, number, share, stored

try:
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:
    intrinsic = None

SIDE = 32  # rows, columns and products of a step
TERMS = 3  # of an FP32 number
_ROWS = 256  # of x that stay in the cache while a thread walks its columns
_SPEED = 16  # times that of vector instructions, for `share`
_REQUEST_PERMISSION, _ARCH_PRCTL, _TILE_DATA = 0x1023, 158, 18  # of Linux on x86-64


@cache
def has_amx() -> bool:
    """Does this CPU have tiles for BF16, and does the system let this process use them?"""
    if intrinsic is None or platform.machine() != "x86_64" or platform.system() != "Linux":
        return False
    features = binding.get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16")):
        return False
    return ctypes.CDLL(None, use_errno=True).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


if intrinsic is not None:

    class _Tile(ir.Type):
        def _to_string(self) -> str:
            return "x86_amx"

        def __eq__(self, other: object) -> bool:
            return isinstance(other, _Tile)

        def __hash__(self) -> int:
            return hash(_Tile)

    def _tiles(terms):
        @intrinsic
        def multiply_tiles(_, x, x_at, x_stride, weight, weight_at, steps, y):
            """y FP32 [32, 32] = sum over `steps` >= 1 of 32 products. x begins at byte x_at, its rows x_stride bytes
            apart, each with its terms one after another; the packed columns of the weight begin at byte weight_at."""
            i = types.intp
            return types.void(x, i, i, weight, i, i, y), generate

        def generate(context, builder, signature, args):
            byte, half, wide = ir.IntType(8).as_pointer(), ir.IntType(16), ir.IntType(64)
            tile, nothing = _Tile(), ir.VoidType()
            x, weight, y = (
                builder.bitcast(context.make_array(signature.args[i])(context, builder, value=args[i]).data, byte)
                for i in (0, 3, 6)
            )
            x_at, x_stride, weight_at, steps = args[1], args[2], args[4], args[5]
            rows, columns = ir.Constant(half, 16), ir.Constant(half, 64)  # columns in bytes

            def call(name, result, *values):
                function = ir.FunctionType(result, [value.type for value in values])
                return builder.call(cgutils.get_or_insert_function(builder.module, function, name), values)

            def number_of(n):
                return ir.Constant(wide, n)

            def load(array, at, stride):
                return call("llvm.x86.tileloadd64.internal", tile, rows, columns, builder.gep(array, [at]), stride)

            zeros = [call("llvm.x86.tilezero.internal", tile, rows, columns) for _ in range(4)]
            before, loop = builder.block, builder.append_basic_block()
            after = builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            step, *sums = (builder.phi(each) for each in (wide, tile, tile, tile, tile))
            column = builder.add(weight_at, builder.mul(step, number_of(2 * SIDE * SIDE)))
            right = [load(weight, builder.add(column, number_of(n)), number_of(4 * SIDE)) for n in (0, 64)]
            totals = sums
            for term in reversed(range(terms)):
                place = builder.add(step, builder.mul(steps, number_of(term)))
                begin = builder.add(x_at, builder.mul(place, number_of(2 * SIDE)))
                lower = builder.add(begin, builder.mul(x_stride, number_of(16)))
                left = [load(x, at, x_stride) for at in (begin, lower)]
                totals = [
                    call(
                        "llvm.x86.tdpbf16ps.internal", tile, rows, columns, columns, totals[2 * i + j], left[i],
                        right[j],
                    )
                    for i in range(2)
                    for j in range(2)
                ]  # fmt: skip
            following = builder.add(step, number_of(1))
            for phi, first, later in zip([step, *sums], [number_of(0), *zeros], [following, *totals], strict=True):
                phi.add_incoming(first, before)
                phi.add_incoming(later, loop)
            builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
            builder.position_at_end(after)
            for i in range(2):
                for j in range(2):
                    at = builder.gep(y, [number_of(4 * SIDE * 16 * i + 64 * j)])
                    stride, total = number_of(4 * SIDE), totals[2 * i + j]
                    call("llvm.x86.tilestored64.internal", nothing, rows, columns, at, stride, total)
            return context.get_dummy_value()

        return multiply_tiles

    _multiply_tiles, _multiply_split_tiles = _tiles(1), _tiles(TERMS)


@compiled
def _pack_kernel(begin, end, weight, packed):
    """Items are blocks of 32 columns; packed [N / 32, K / 32, 16, 32, 2], zero where the weight [N, K] has ended."""
    terms = weight.shape[1]
    for block in range(begin, end):
        for column in range(min(SIDE, weight.shape[0] - block * SIDE)):
            row = weight[block * SIDE + column]
            for k in range(terms):
                packed[block, k // SIDE, k % SIDE // 2, column, k % 2] = stored(number(row[k]), packed)


@compiled
def _split_kernel(begin, end, x, terms):
    """Items are rows: x [M, K] to terms [M, TERMS, K'], the largest first, zero where x has ended."""
    for row in range(begin, end):
        for i in range(x.shape[1]):
            left = x[row, i]
            for term in range(TERMS):
                terms[row, term, i] = stored(left, terms)
                left -= number(terms[row, term, i])


@compiled
def _product_kernel(begin, end, x, packed, bounds, y):
    """Items are blocks of 32 columns of y, group by group: rows bounds[g] .. bounds[g + 1] - 1 have weight g. x is
    [M, K'], or its terms side by side."""
    blocks, steps = packed.shape[1:3]
    rows, stride, size = x.shape[0], x.shape[1] * 2, steps * 2 * SIDE * SIDE
    sums, tail, tail_from = np.empty((SIDE, SIDE), f32), np.zeros((SIDE, x.shape[1]), x.dtype), rows
    longest = 0
    for group in range(begin // blocks, (end + blocks - 1) // blocks):
        longest = max(longest, bounds[group + 1] - bounds[group])
    for top in range(0, longest, _ROWS):
        for item in range(begin, end):
            block, first, last = item % blocks, bounds[item // blocks] + top, bounds[item // blocks + 1]
            columns = min(SIDE, y.shape[1] - block * SIDE)
            for row in range(first, min(first + _ROWS, last), SIDE):
                source, at = x, row * stride
                if row + SIDE > rows:  # the memory ends before the tile does
                    if tail_from != row:
                        tail[: rows - row], tail_from = x[row:], row
                    source, at = tail, 0
                if x.shape[1] > steps * SIDE:
                    _multiply_split_tiles(source, at, stride, packed, item * size, steps, sums)
                else:
                    _multiply_tiles(source, at, stride, packed, item * size, steps, sums)
                for r in range(min(SIDE, last - row)):
                    result, target = sums[r], y[row + r, block * SIDE : block * SIDE + columns]
                    if columns == SIDE:
                        for i in range(SIDE):  # a length known beforehand is faster
                            target[i] = stored(result[i], y)
                    else:
                        for i in range(columns):
                            target[i] = stored(result[i], y)


def pack(weight: Tensor) -> Tensor:
    """Weight [..., N, K] in FP32 or BF16, rounded to BF16 -> as `multiply` reads it, BF16 [..., N', K', 16, 32, 2]."""
    *outer, width, terms = weight.shape
    blocks, steps = -(-width // SIDE), -(-terms // SIDE)
    packed = torch.zeros(*outer, blocks, steps, SIDE // 2, SIDE, 2, dtype=torch.bfloat16)
    matrices = weight.detach().contiguous().view(-1, width, terms)
    for matrix, target in zip(matrices, packed.view(-1, *packed.shape[-5:]), strict=True):
        share(_pack_kernel, blocks, 4 * matrix.numel(), matrix, target)
    return packed


def split(x: Tensor) -> Tensor:
    """x FP32 [M, K] -> its three BF16 terms, [M, 3 K'], for `multiply`."""
    terms = torch.zeros(len(x), TERMS, -(-x.shape[1] // SIDE) * SIDE, dtype=torch.bfloat16)
    share(_split_kernel, len(x), 10 * x.numel(), x.contiguous(), terms)
    return terms.flatten(1)


def multiply(x: Tensor, packed: Tensor, width: int, out: torch.dtype, counts: list[int] | None = None) -> Tensor:
    """x BF16 [M, K] or from `split`, packed from a weight of `width` rows -> [M, N] in `out`, BF16 or FP32.

    counts: rows of each group of x, for a packed weight each [E, ...].
    """
    bounds = np.cumsum([0, *([len(x)] if counts is None else counts)])
    packed = packed if counts is not None else packed.unsqueeze(0)
    terms = packed.shape[2] * SIDE
    x = (x if x.shape[1] >= terms else F.pad(x, (0, terms - x.shape[1]))).contiguous()
    y = x.new_empty(len(x), width, dtype=out)
    operations = 2 * len(x) * width * x.shape[1] // _SPEED
    share(_product_kernel, packed.shape[0] * packed.shape[1], operations, x, packed, bounds, y)
    return y
