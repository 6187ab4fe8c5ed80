"""Products of matrices on a CPU: y = x W^T, summed in FP32 and rounded once. Private to `ops`.

The libraries' products cut a sum differently for some numbers of rows and threads, each by rules of its own. Here an
element has one FP32 accumulator that runs over K in order, whatever is computed beside it (design A1, A2), and W is
laid out once, in blocks of 32 columns, for the unit that multiplies:

    tiles     BF16 by AMX, 32 products into an accumulator at a time (Intel 64 manual, TDPBF16PS)
    pairs     BF16 by AVX-512, 2 products at a time (VDPBF16PS)
    numbers   FP32 x by vector instructions, one product at a time, fused; W is FP32 or BF16

Letters: M rows, N and K out and in features, as in y [M, N] = x [M, K] W [N, K]^T.
"""

import ctypes
import platform
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ops.compiled import ZERO, compiled, f32, features, number, plain, readable, share, stored

try:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    from ops.compiled import prefetch
except ImportError:
    intrinsic = None

COLUMNS = 32  # of W that lie side by side in memory
DEPTH = 32  # products of a step of tiles; K is padded to a multiple where numbers go in pairs
_LANES = 16
_STRIP, _HEIGHT = 128, 32  # most rows of a strip, and what they are a multiple of
_BLOCK_BYTES = 1 << 18  # of W, that stay in the cache while rows pass by
_SPEED = 16  # times that of other kernels, for `share`
_REQUEST_PERMISSION, _ARCH_PRCTL, _TILE_DATA = 0x1023, 158, 18  # of Linux on x86-64


@cache
def has_tiles() -> bool:
    """Does this CPU have tiles for BF16, and does the system let this process use them?"""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return False
    if not (features().get("amx-tile") and features().get("amx-bf16")):
        return False
    return ctypes.CDLL(None, use_errno=True).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


@cache
def has_pairs() -> bool:
    """Does this CPU multiply BF16 numbers, in tiles or in pairs?"""
    return has_tiles() or bool(features().get("avx512bf16"))


def bf16_products() -> str:
    """How this CPU multiplies BF16 numbers: in "tiles", in "pairs", or as FP32 "numbers"."""
    return "tiles" if has_tiles() else "pairs" if has_pairs() else "numbers"


# Accumulators must fit the registers: 32 of 16 numbers with AVX-512, else 16 of 8.
_TILE_ROWS, _TILE_VECTORS = (8, 2) if features().get("avx512f") else (4, 1)
_TILE_SIDE = 32  # rows and columns that AMX takes in four tiles


if intrinsic is not None:

    class _Named(ir.Type):
        """A type of LLVM that llvmlite has no class for."""

        def __init__(self, name: str) -> None:
            self._name = name

        def _to_string(self) -> str:
            return self._name

        def __eq__(self, other: object) -> bool:
            return isinstance(other, _Named) and other._name == self._name

        def __hash__(self) -> int:
            return hash(self._name)

    def _pointer(context, builder, signature, args, position, element=None):
        """To the memory of an array argument."""
        data = context.make_array(signature.args[position])(context, builder, value=args[position]).data
        return builder.bitcast(data, element.as_pointer()) if element else data

    @intrinsic
    def _multiply_vectors(_, x, x_at, x_stride, rows, weight, weight_at, terms, ahead, ahead_step, sums, sums_at):
        """sums[_TILE_ROWS, COLUMNS] from column sums_at on = sums over `terms` of W's rows, for 1 <= rows <= _TILE_ROWS
        rows of x; whatever in the sums of other rows. x begins at x_at, its rows x_stride apart; packed columns begin
        at weight_at. Of type int32, both hold pairs of BF16 numbers; else x is FP32 and int16 of W BF16. On the way
        comes into the cache what of W begins at `ahead`, `ahead_step` numbers for each of the terms."""

        def generate(context, builder, signature, args):
            word, half, size = ir.IntType(32), ir.IntType(16), args[1].type
            floats, words = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(word, _LANES)
            x, weight, sums = (_pointer(context, builder, signature, args, i) for i in (0, 4, 9))
            x_at, x_stride, rows, weight_at, terms, ahead, ahead_step, sums_at = (
                args[i] for i in (1, 2, 3, 5, 6, 7, 8, 10)
            )
            lanes, none = ir.Constant(words, None), ir.Constant(word, 0)
            kind = signature.args[4].dtype

            def number_of(n):
                return ir.Constant(size, n)

            def vector(at):
                place = builder.gep(weight, [at])
                if kind != types.int16:
                    vectors = words if kind == types.int32 else floats
                    return builder.load(builder.bitcast(place, vectors.as_pointer()), align=4)
                halves = ir.VectorType(half, _LANES)
                wide = builder.zext(builder.load(builder.bitcast(place, halves.as_pointer()), align=2), words)
                return builder.bitcast(builder.shl(wide, ir.Constant(words, [16] * _LANES)), floats)

            def everywhere(value):
                vectors = ir.VectorType(value.type, _LANES)
                undefined = ir.Constant(vectors, ir.Undefined)
                return builder.shuffle_vector(builder.insert_element(undefined, value, none), undefined, lanes)

            def add_product(total, a, b):
                if kind == types.int32:
                    pairs = ir.VectorType(_Named("bfloat"), 2 * _LANES)
                    name, operands = "llvm.x86.avx512bf16.dpbf16ps.512", (floats, pairs, pairs)
                    values = total, builder.bitcast(a, pairs), builder.bitcast(b, pairs)
                else:
                    name, operands, values = f"llvm.fma.v{_LANES}f32", (floats,) * 3, (a, b, total)
                function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(floats, operands), name)
                return builder.call(function, values)

            places = []
            for r in range(_TILE_ROWS):
                last = builder.sub(rows, number_of(1))
                exists = builder.icmp_signed("<", number_of(r), rows)
                row = builder.select(exists, number_of(r), last)
                places.append(builder.gep(x, [builder.add(x_at, builder.mul(row, x_stride))]))
            totals = [[cgutils.alloca_once(builder, floats) for _ in range(_TILE_VECTORS)] for _ in range(_TILE_ROWS)]
            for own in totals:
                for total in own:
                    builder.store(ir.Constant(floats, None), total)
            with cgutils.for_range(builder, terms) as loop:
                at = builder.add(weight_at, builder.mul(loop.index, number_of(COLUMNS)))
                columns = [vector(builder.add(at, number_of(_LANES * v))) for v in range(_TILE_VECTORS)]
                later = builder.add(ahead, builder.mul(loop.index, ahead_step))
                prefetch(builder, builder.gep(weight, [later]))
                for place, own in zip(places, totals, strict=True):
                    value = everywhere(builder.load(builder.gep(place, [loop.index])))
                    for column, total in zip(columns, own, strict=True):
                        builder.store(add_product(builder.load(total), value, column), total)
            for r, own in enumerate(totals):
                for v, total in enumerate(own):
                    at = builder.gep(sums, [builder.add(sums_at, number_of(COLUMNS * r + _LANES * v))])
                    builder.store(builder.load(total), builder.bitcast(at, floats.as_pointer()), align=4)
            return context.get_dummy_value()

        i = types.intp
        return types.void(x, i, i, i, weight, i, i, i, i, sums, i), generate

    @intrinsic
    def _multiply_tiles(_, x, x_at, x_stride, weight, weight_at, steps, sums):
        """sums FP32 [32, 32] over `steps` >= 1 of DEPTH products. x begins at byte x_at, its rows x_stride bytes apart;
        packed columns begin at byte weight_at."""

        def generate(context, builder, signature, args):
            half, wide = ir.IntType(16), ir.IntType(64)
            tile, nothing = _Named("x86_amx"), ir.VoidType()
            x, weight, sums = (_pointer(context, builder, signature, args, i, ir.IntType(8)) for i in (0, 3, 6))
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
            step, *totals = (builder.phi(each) for each in (wide, tile, tile, tile, tile))
            column = builder.add(weight_at, builder.mul(step, number_of(2 * DEPTH * COLUMNS)))
            right = [load(weight, builder.add(column, number_of(n)), number_of(4 * COLUMNS)) for n in (0, 64)]
            begin = builder.add(x_at, builder.mul(step, number_of(2 * DEPTH)))
            lower = builder.add(begin, builder.mul(x_stride, number_of(16)))
            left = [load(x, at, x_stride) for at in (begin, lower)]
            added = [
                call("llvm.x86.tdpbf16ps.internal", tile, rows, columns, columns, totals[2 * i + j], left[i], right[j])
                for i in range(2)
                for j in range(2)
            ]
            following = builder.add(step, number_of(1))
            for phi, first, later in zip([step, *totals], [number_of(0), *zeros], [following, *added], strict=True):
                phi.add_incoming(first, before)
                phi.add_incoming(later, loop)
            builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
            builder.position_at_end(after)
            for i in range(2):
                for j in range(2):
                    at = builder.gep(sums, [number_of(4 * COLUMNS * 16 * i + 64 * j)])
                    stride, total = number_of(4 * COLUMNS), added[2 * i + j]
                    call("llvm.x86.tilestored64.internal", nothing, rows, columns, at, stride, total)
            return context.get_dummy_value()

        i = types.intp
        return types.void(x, i, i, weight, i, i, sums), generate


@compiled
def _store(sums, rows, y, row, column):
    """The first rows of sums [., COLUMNS] to y, rounded, as far as y has columns."""
    columns = min(COLUMNS, y.shape[1] - column)
    for r in range(rows):
        result, target = sums[r], y[row + r, column : column + columns]
        if columns == COLUMNS:
            for i in range(COLUMNS):  # a length known beforehand is faster
                target[i] = stored(result[i], y)
        else:
            for i in range(columns):
                target[i] = stored(result[i], y)


# The rows of a group are cut into strips of equal length, which stay in the cache while a thread walks columns. Units
# of work are blocks of columns of y, strip by strip, so threads get rows of their own as soon as there are strips
# enough.


@compiled
def _strips(rows):
    return (rows + _STRIP - 1) // _STRIP


@compiled
def _units_of(begin, end, items, bounds, blocks):
    """The units between begin / items and end / items of all, as there may be fewer than the caller could know of."""
    strips = 0
    for group in range(len(bounds) - 1):
        strips += _strips(bounds[group + 1] - bounds[group])
    return strips * blocks * begin // items, strips * blocks * end // items


@compiled
def _strip(number, bounds):
    """The group that strip `number` belongs to, its first row and the one behind its last."""
    for group in range(len(bounds) - 1):
        rows = bounds[group + 1] - bounds[group]
        strips = _strips(rows)
        if number < strips:
            height = (rows + strips - 1) // strips
            height = (height + _HEIGHT - 1) // _HEIGHT * _HEIGHT
            first = min(bounds[group] + number * height, bounds[group + 1])
            return group, first, min(first + height, bounds[group + 1])
        number -= strips
    return 0, 0, 0


@compiled
def _together(packed, blocks):
    """How many of a thread's blocks of columns stay in the cache while rows pass by: at most an eighth, as the first
    come from memory while nothing is computed, and the others while those before them are."""
    return max(1, min(blocks // 8, _BLOCK_BYTES // (packed.shape[1] * COLUMNS * packed.itemsize)))


@compiled
def _ahead_step(rows):
    """Numbers of a later weight to fetch for each term, so that all come while `rows` pass by. None for few rows, which
    wait for memory alone: there the machine's own prefetching is better (1 to 16 rows: by up to 1.6 times)."""
    passes = (rows + _TILE_ROWS - 1) // _TILE_ROWS
    return COLUMNS // passes if passes > 2 else 0


@compiled
def _round_rows(x, first, last, halves):
    """Rows of x [M, K] to BF16 in halves [., K'], which is zero beyond K."""
    for row in range(first, last):
        source, target = x[row], halves[row - first]
        for k in range(source.shape[0]):
            target[k] = stored(number(source[k]), halves)


@compiled
def _multiply_strip(x, packed, group, block, stop, y):
    """All rows of y, in the columns of blocks block .. stop - 1 of a weight whose blocks begin at `group` in packed
    [., terms, COLUMNS]; x has `terms` words to a row."""
    rows, terms = y.shape[0], packed.shape[1]
    sums, wide = np.empty((_TILE_ROWS, COLUMNS), f32), _together(packed, stop - block)
    for some in range(block, stop, wide):
        step = _ahead_step(rows) if some + wide < stop else 0
        for row in range(0, rows, _TILE_ROWS):
            height = min(_TILE_ROWS, rows - row)
            for each in range(some, min(some + wide, stop)):
                for column in range(0, COLUMNS, _TILE_VECTORS * _LANES):
                    at = (group + each) * terms * COLUMNS + column
                    ahead = at + (step > 0) * wide * terms * COLUMNS + row // _TILE_ROWS * terms * step
                    _multiply_vectors(x, row * terms, terms, height, packed, at, terms, ahead, step, sums, column)
                _store(sums, height, y, row, each * COLUMNS)


# In all three x is [M, K], and rows bounds[g] .. bounds[g + 1] - 1 of it have weight g.


@compiled
def _numbers_kernel(begin, end, items, x, packed, bounds, y):
    """packed [blocks of all groups, K, COLUMNS]"""
    blocks = len(packed) // (len(bounds) - 1)
    unit, last_unit = _units_of(begin, end, items, bounds, blocks)
    while unit < last_unit:
        group, first, last = _strip(unit // blocks, bounds)
        block, stop = unit % blocks, min(blocks, unit % blocks + last_unit - unit)
        unit += stop - block
        _multiply_strip(x[first:last], packed, group * blocks, block, stop, y[first:last])


@compiled
def _pairs_kernel(begin, end, items, x, packed, bounds, y):
    """packed [blocks of all groups, K' / 2, COLUMNS] pairs"""
    blocks = len(packed) // (len(bounds) - 1)
    halves = np.zeros((_STRIP, 2 * packed.shape[1]), np.int16)
    unit, last_unit = _units_of(begin, end, items, bounds, blocks)
    while unit < last_unit:
        group, first, last = _strip(unit // blocks, bounds)
        block, stop = unit % blocks, min(blocks, unit % blocks + last_unit - unit)
        unit += stop - block
        _round_rows(x, first, last, halves)
        _multiply_strip(halves.view(np.int32), packed, group * blocks, block, stop, y[first:last])


@compiled
def _tiles_kernel(begin, end, items, x, packed, bounds, y):
    """packed [blocks of all groups, K' / 2, COLUMNS] pairs"""
    blocks, terms = len(packed) // (len(bounds) - 1), packed.shape[1]
    steps, stride, size = 2 * terms // DEPTH, 4 * terms, 4 * terms * COLUMNS
    sums, halves = np.empty((_TILE_SIDE, COLUMNS), f32), np.zeros((_STRIP, 2 * terms), np.int16)
    unit, last_unit = _units_of(begin, end, items, bounds, blocks)
    while unit < last_unit:
        group, first, last = _strip(unit // blocks, bounds)
        block, stop = unit % blocks, min(blocks, unit % blocks + last_unit - unit)
        unit += stop - block
        _round_rows(x, first, last, halves)
        for each in range(block, stop):
            for row in range(first, last, _TILE_SIDE):
                at = (group * blocks + each) * size
                _multiply_tiles(halves, (row - first) * stride, stride, packed, at, steps, sums)
                _store(sums, min(_TILE_SIDE, last - row), y, row, each * COLUMNS)


# Items are blocks of columns, of W [E, N, K] or transposed [E, K, N] one weight after another, to packed
# [E * blocks, K, COLUMNS] or, in pairs, [E * blocks, K' / 2, COLUMNS]; zero where W has ended.


@compiled
def _pair(low, high, halves):
    """Two numbers as BF16 in one word, the first in its lower half."""
    return (np.int32(stored(number(high), halves)) << np.int32(16)) | (
        np.int32(stored(number(low), halves)) & np.int32(0xFFFF)
    )


@compiled
def _pack_pairs_kernel(begin, end, weight, blocks, packed):
    halves, terms = np.empty(0, np.int16), weight.shape[2]
    for item in range(begin, end):
        group, first = item // blocks, item % blocks * COLUMNS
        for column in range(min(COLUMNS, weight.shape[1] - first)):
            row, target = weight[group, first + column], packed[item]
            for k in range(terms // 2):
                target[k, column] = _pair(row[2 * k], row[2 * k + 1], halves)
            if terms % 2:
                target[terms // 2, column] = _pair(row[terms - 1], ZERO, halves)


@compiled
def _pack_numbers_kernel(begin, end, weight, blocks, packed):
    for item in range(begin, end):
        group, first = item // blocks, item % blocks * COLUMNS
        for column in range(min(COLUMNS, weight.shape[1] - first)):
            row, target = weight[group, first + column], packed[item]
            for k in range(row.shape[0]):
                target[k, column] = stored(number(row[k]), packed)


@compiled
def _pack_transposed_pairs_kernel(begin, end, weight, blocks, packed):
    halves, terms = np.empty(0, np.int16), weight.shape[1]
    for item in range(begin, end):
        group, first = item // blocks, item % blocks * COLUMNS
        last = min(first + COLUMNS, weight.shape[2])
        for k in range(terms // 2):
            low, high = weight[group, 2 * k, first:last], weight[group, 2 * k + 1, first:last]
            target = packed[item, k]
            for column in range(low.shape[0]):
                target[column] = _pair(low[column], high[column], halves)
        if terms % 2:
            low, target = weight[group, terms - 1, first:last], packed[item, terms // 2]
            for column in range(low.shape[0]):
                target[column] = _pair(low[column], ZERO, halves)


@compiled
def _pack_transposed_numbers_kernel(begin, end, weight, blocks, packed):
    for item in range(begin, end):
        group, first = item // blocks, item % blocks * COLUMNS
        last = min(first + COLUMNS, weight.shape[2])
        for k in range(weight.shape[1]):
            source, target = weight[group, k, first:last], packed[item, k]
            for column in range(source.shape[0]):
                target[column] = stored(number(source[column]), packed)


def pack(weight: Tensor, dtype: torch.dtype, pairs: bool, transposed: bool = False) -> Tensor:
    """Weight [..., N, K], or [..., K, N] if `transposed`, N and K >= 1, in FP32 or BF16, rounded to `dtype`, one of
    them -> as `multiply` reads it: in `pairs` [..., N', K', COLUMNS, 2], for FP32 rows [..., N', K, COLUMNS]."""
    *outer, rows, columns = weight.shape
    width, terms = (columns, rows) if transposed else (rows, columns)
    blocks = -(-width // COLUMNS)
    if pairs:
        kernel = _pack_transposed_pairs_kernel if transposed else _pack_pairs_kernel
        packed = torch.zeros(*outer, blocks, -(-terms // DEPTH) * DEPTH // 2, COLUMNS, 2, dtype=dtype)
        target = packed.view(torch.int32).squeeze(-1)
    else:
        kernel = _pack_transposed_numbers_kernel if transposed else _pack_numbers_kernel
        target = packed = torch.zeros(*outer, blocks, terms, COLUMNS, dtype=dtype)
    target, matrices = target.flatten(0, -3), weight.detach().reshape(-1, rows, columns)
    share(kernel, len(target), 2 * weight.numel(), readable(matrices), blocks, target)
    return packed


def multiply(x: Tensor, packed: Tensor, width: int, out: torch.dtype, bounds: Tensor | None = None) -> Tensor:
    """x [M, K] FP32 or BF16, packed from a weight of `width` rows -> [M, N] in `out`, BF16 or FP32.

    x is rounded to BF16 where the weight is packed in pairs, and taken as FP32 where not. bounds: int64 [E + 1], for a
    packed weight each [E, ...]: rows bounds[e] .. bounds[e + 1] - 1 of x meet weight e.
    """
    if bounds is None:
        bounds, packed = torch.tensor([0, len(x)]), packed.unsqueeze(0)
    if packed.ndim == 5:
        kernel, x = _tiles_kernel if has_tiles() else _pairs_kernel, readable(x)
        packed = packed.view(torch.int32).squeeze(-1)
    else:
        kernel, x = _numbers_kernel, plain(x)
    y = torch.empty(len(x), width, dtype=out)
    items = (len(x) // _STRIP + len(packed)) * packed.shape[1]  # as many units as there may be
    operations = 2 * len(x) * width * x.shape[1] // _SPEED
    share(kernel, items, operations, items, x, packed.flatten(0, 1), bounds, y)
    return y


def matmul(a: Tensor, b: Tensor, out: torch.dtype) -> Tensor:
    """a [M, K] @ b [K, N], both FP32 or both BF16 -> [M, N] in `out`, one of them: for gradients."""
    return multiply(a, pack(b, b.dtype, b.dtype == torch.bfloat16 and has_pairs(), transposed=True), b.shape[1], out)
