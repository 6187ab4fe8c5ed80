"""Matrix products of the Triton path: y = x W^T for any number of rows, and the gradient of W. Private to `ops`.

Row m of y has the same bits for every M (design A1, A2): tile and segments of the reduction follow from the weight's
shape and the dtypes. Only who computes a segment follows the load: with few tiles (decode) there is one program for
each segment and a second kernel adds up, else one program does them all. The bits are equal (`ops.tiles.tile_product`).

Letters: M rows, N and K out and in features, as in y [M, N] = x [M, K] W [N, K]^T. Tiles are computed transposed,
y^T = W x^T, so that weights fill the 64 rows of a tensor-core instruction however few rows x has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.jit import divide_up, jit, launch, like, tl, triton_dtype
from ops.tiles import grouped_tile, tile_product


@dataclass(frozen=True)
class Tile:
    """out x rows elements of y by one program, `inner` terms of the sum at a time."""

    out: int
    rows: int
    inner: int
    warps: int
    stages: int  # of loads under way, where two programs share a multiprocessor
    deep: int  # where one has it for itself: few programs, or registers for the sum of a segment and for the total
    segment: int = 512  # least number of terms in a segment of K; shorter ones cost training more than they give decode


# Chosen for sm_90: the most work for each byte loaded, without spilled registers.
BF16_TILE = Tile(out=128, rows=128, inner=64, warps=8, stages=3, deep=5, segment=1024)
SPLIT_TILE = Tile(out=128, rows=64, inner=64, warps=8, stages=3, deep=3, segment=256)  # FP32 as three BF16 terms
FP32_TILE = Tile(out=64, rows=64, inner=32, warps=8, stages=2, deep=2)
# Both operands in terms: less than 64 rows, so that products run on mma.sync. The wgmma of larger tiles would read a
# from registers while the next terms are written there, which compilers of Triton 3.6 are known to get wrong.
SPLIT_BOTH_TILE = Tile(out=32, rows=64, inner=32, warps=4, stages=3, deep=3)

# About the multiprocessors of an H100 or H200. They shape the segments, so they are constants, not what is found.
PROGRAMS = 128
FILLING = 64  # programs that keep device memory busy
ROWS_SEGMENT = 2048  # of M, in the gradient of a weight
GROUP = 8  # tiles of x that are walked together while a tile of W is in the L2 cache
MERGE_BLOCK = 1024


@jit("rows")
def _product_kernel(
    x_ptr, weight_ptr, y_ptr, rows,
    N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr, SEGMENT: tl.constexpr, ALONE: tl.constexpr,
    GROUP: tl.constexpr, OPERAND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (tile, segment): that segment alone into y [segments, rows, N], or all segments of the tile."""
    row_tile, column_tile = grouped_tile(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[None, :]
    column = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    first, last, segment = 0, K, tl.program_id(1)
    if ALONE:
        first, last = segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, K)
    k = first + tl.arange(0, BLOCK_K)
    weight = weight_ptr + (column + k[None, :] * N if TRANSPOSED else column * K + k[None, :])
    y = tile_product(
        weight, x_ptr + row * K + k[:, None], column < N, row < rows, first, last, N if TRANSPOSED else 1, 1,
        None if ALONE or SEGMENT >= K else SEGMENT, BLOCK_N, BLOCK_M, BLOCK_K, OPERAND,
        K % BLOCK_K == 0 and SEGMENT % BLOCK_K == 0,
    )  # fmt: skip
    tl.store(y_ptr + (segment.to(tl.int64) * rows + row) * N + column, y, mask=(column < N) & (row < rows))


@jit("rows")
def _gradient_kernel(
    grad_ptr, x_ptr, y_ptr, rows,
    N: tl.constexpr, K: tl.constexpr, SEGMENT: tl.constexpr, ALONE: tl.constexpr, GROUP: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The same for y [segments, N, K] = grad^T x, whose sums run over rows."""
    n_tile, k_tile = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP)
    n = (n_tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    k = (k_tile * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    first, last, segment = 0, rows, tl.program_id(1)
    if ALONE:
        first, last = segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, rows)
    row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    y = tile_product(
        grad_ptr + row[None, :] * N + n, x_ptr + row[:, None] * K + k, n < N, k < K, first, last, N, K,
        None if ALONE else SEGMENT, BLOCK_N, BLOCK_K, BLOCK_M, OPERAND, False,
    )  # fmt: skip
    tl.store(y_ptr + (segment.to(tl.int64) * N + n) * K + k, y, mask=(n < N) & (k < K))


@jit("segments", "rows")
def _merge_kernel(
    partial_ptr, y_ptr, segments, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """y [rows, WIDTH] = sum of partial [segments, rows, WIDTH], ascending; UNROLL loads are under way at a time."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows * WIDTH
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, segments, UNROLL):
        for i in tl.static_range(UNROLL):
            place = (begin + i) * rows * WIDTH + at
            total += tl.load(partial_ptr + place, mask=inside & (place < segments * rows * WIDTH), other=0.0)
    tl.store(y_ptr + at, total, mask=inside)


def multiply(x: Tensor, weight: Tensor, out: torch.dtype, transposed: bool = False) -> Tensor:
    """x [M, K] times weight [N, K]^T, or weight [K, N] if `transposed` -> [M, N] in dtype `out`.

    Both BF16, both FP32, or x FP32 and weight BF16: then the product is that of FP32 numbers (`accumulate_fp32`).
    `transposed` serves gradients, which owe the same bits to no decode step: their sum is one segment.
    """
    assert weight.numel() < 2**31, "offsets into the weight are 32 bits wide"
    (rows, inner), width = x.shape, weight.shape[1 if transposed else 0]
    tile = product_tile(x.dtype, weight.dtype)
    segment = inner if transposed else segment_length(width, inner, tile)
    tiles, segments = divide_up(rows, tile.rows) * divide_up(width, tile.out), divide_up(inner, segment)
    alone = tiles * segments <= PROGRAMS
    partial = alone and segments > 1
    y = like(x, segments, rows, width) if partial else like(x, rows, width, dtype=out)
    launch(
        _product_kernel, (tiles, segments if alone else 1), x, weight, y, rows, N=width, K=inner,
        TRANSPOSED=transposed, SEGMENT=segment, ALONE=alone, GROUP=GROUP, OPERAND=triton_dtype(weight.dtype),
        BLOCK_N=tile.out, BLOCK_M=tile.rows, BLOCK_K=tile.inner,
        warps=tile.warps, stages=tile.deep if alone or segments > 1 else tile.stages,
    )  # fmt: skip
    return _merge(y, out) if partial else y


def weight_gradient(grad: Tensor, x: Tensor, operand: torch.dtype, out: torch.dtype) -> Tensor:
    """grad [M, N]^T times x [M, K] -> [N, K] in dtype `out`. Both FP32 and operand BF16: in terms, as FP32 numbers."""
    (rows, width), inner = grad.shape, x.shape[1]
    tile = SPLIT_BOTH_TILE if x.dtype != operand else product_tile(x.dtype, operand)
    tiles, segments = divide_up(width, tile.out) * divide_up(inner, tile.rows), divide_up(rows, ROWS_SEGMENT)
    alone = segments > 1 and tiles * tile.warps <= FILLING * BF16_TILE.warps
    y = like(x, segments, width, inner) if alone else like(x, width, inner, dtype=out)
    launch(
        _gradient_kernel, (tiles, segments if alone else 1), grad, x, y, rows, N=width, K=inner, SEGMENT=ROWS_SEGMENT,
        ALONE=alone, GROUP=GROUP, OPERAND=triton_dtype(operand),
        BLOCK_N=tile.out, BLOCK_K=tile.rows, BLOCK_M=tile.inner, warps=tile.warps, stages=tile.deep,
    )  # fmt: skip
    return _merge(y, out) if alone else y


def product_tile(x: torch.dtype, weight: torch.dtype) -> Tile:
    """The tile of a product of these operands: a function of dtypes alone."""
    if weight == torch.float32:
        return FP32_TILE
    return SPLIT_TILE if x == torch.float32 else BF16_TILE


def segment_length(width: int, inner: int, tile: Tile) -> int:
    """Length of a segment of the sum over K = inner, for N = width: so many that one row of tiles fills a GPU."""
    segments = max(1, FILLING // divide_up(width, tile.out))
    return divide_up(max(tile.segment, divide_up(inner, segments)), tile.inner) * tile.inner


def _merge(partial: Tensor, out: torch.dtype) -> Tensor:
    segments, rows, width = partial.shape
    y = like(partial, rows, width, dtype=out)
    grid = (divide_up(rows * width, MERGE_BLOCK),)
    launch(_merge_kernel, grid, partial, y, segments, rows, WIDTH=width, BLOCK=MERGE_BLOCK, UNROLL=8)
    return y
