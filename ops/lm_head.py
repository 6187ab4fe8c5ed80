"""The language-model head on a GPU: tiles of logits, what a row needs of them, and their gradients. Private to `ops`.

    x[t, v] = sum_d hidden[t, d] W[v, d] / temperature[t]

The vocabulary is cut in fixed tiles of columns. A tile leaves three FP32 numbers for each of its rows: its largest x,
the sum of exp(x - largest), and the sum of exp(x - largest) x. `_merge_statistics_kernel` brings them together in one
fixed order, so the bits of a row depend neither on the other rows nor on their number. Logits reach memory only where
a caller has room for them.

Both operands are in the working dtype, sums and logits in FP32. Gradients of logits are rounded to the type of the
operands: each term of the two sums they go into is off by 2^-8 of itself at most, and they are added up in FP32.
"""

import torch
from torch import Tensor

from ops.jit import aligned, divide_up, jit, launch, like, next_power_of_two, tl, triton_dtype
from ops.matmul import multiply, weight_gradient
from ops.tiles import accumulate, grouped_tile

GROUP = 16  # row tiles that walk the vocabulary together, so that both operands stay in the L2 cache

# One tile for training, prefill and decode.
_TILES = {
    torch.bfloat16: {"BLOCK_T": 64, "BLOCK_V": 256, "BLOCK_D": 64, "warps": 8, "stages": 3},
    torch.float32: {"BLOCK_T": 64, "BLOCK_V": 128, "BLOCK_D": 32, "warps": 8, "stages": 2},
}
_ELEMENTS = 4096  # that a program of the other kernels holds


@jit()
def _logits(
    x_ptr, weight_ptr, temperature_ptr, row, column, rows,
    V: tl.constexpr, D: tl.constexpr, OPERAND: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x FP32 [row, column]"""
    inner = tl.arange(0, BLOCK_D)
    x_at = x_ptr + row.to(tl.int64)[:, None] * D + inner[None, :]
    weight_at = weight_ptr + column.to(tl.int64)[None, :] * D + inner[:, None]
    x = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    for k in range(0, D, BLOCK_D):
        deep = inner < D - k
        hidden = tl.load(x_at + k, mask=(row < rows)[:, None] & deep[None, :], other=0.0)
        weight = tl.load(weight_at + k, mask=deep[:, None] & (column < V)[None, :], other=0.0)
        x = accumulate(hidden, weight, x, OPERAND)
    temperature = tl.load(temperature_ptr + row, mask=row < rows, other=1.0)
    return tl.div_rn(x, temperature[:, None])


@jit("rows")
def _statistics_kernel(
    x_ptr, weight_ptr, temperature_ptr, target_ptr, logits_ptr, chosen_ptr, top_ptr, total_ptr, weighted_ptr, rows,
    V: tl.constexpr, D: tl.constexpr, OPERAND: tl.constexpr, TARGETS: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, tile = grouped_tile(tl.program_id(0), tl.cdiv(rows, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP)
    row = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _logits(x_ptr, weight_ptr, temperature_ptr, row, column, rows, V, D, OPERAND, BLOCK_D)
    exists, inside = row < rows, (column < V)[None, :]
    if KEEP:
        tl.store(logits_ptr + row.to(tl.int64)[:, None] * V + column[None, :], x, mask=exists[:, None] & inside)
    if TARGETS:
        target = tl.load(target_ptr + row, mask=exists, other=-1)
        chosen = tl.sum(tl.where(target[:, None] == column[None, :], x, 0.0), axis=1)
        tl.store(chosen_ptr + row, chosen, mask=exists & (target // BLOCK_V == tile))
    top = tl.max(tl.where(inside, x, float("-inf")), axis=1)
    p = tl.where(inside, tl.exp(x - top[:, None]), 0.0)
    at = row.to(tl.int64) * tl.cdiv(V, BLOCK_V) + tile
    tl.store(top_ptr + at, top, mask=exists)
    tl.store(total_ptr + at, tl.sum(p, axis=1), mask=exists)
    tl.store(weighted_ptr + at, tl.sum(p * x, axis=1), mask=exists)


@jit("rows")
def _merge_statistics_kernel(
    top_ptr, total_ptr, weighted_ptr, log_sum_ptr, entropy_ptr, rows,
    TILES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """From the numbers of all tiles, FP32 [rows, TILES] each: log sum exp x, and entropy, [rows]."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tile = tl.arange(0, BLOCK_S)
    inside = (row < rows)[:, None] & (tile < TILES)[None, :]
    at = row.to(tl.int64)[:, None] * TILES + tile[None, :]
    tops = tl.load(top_ptr + at, mask=inside, other=float("-inf"))
    top = tl.max(tops, axis=1)
    scale = tl.where(inside, tl.exp(tops - top[:, None]), 0.0)
    total = tl.sum(scale * tl.load(total_ptr + at, mask=inside, other=0.0), axis=1)
    weighted = tl.sum(scale * tl.load(weighted_ptr + at, mask=inside, other=0.0), axis=1)
    log_sum = top + tl.log(total)
    tl.store(log_sum_ptr + row, log_sum, mask=row < rows)
    tl.store(entropy_ptr + row, log_sum - tl.div_rn(weighted, total), mask=row < rows)


@jit()
def _softmax_gradient(x, target, column, log_sum, scale):
    """scale (1[v = target] - p_v), where p = exp(x - log_sum); target, log_sum, scale per row."""
    p = tl.exp(x - log_sum[:, None])
    return (tl.where(target[:, None] == column[None, :], 1.0, 0.0) - p) * scale[:, None]


@jit("rows", "first")
def _recomputed_gradient_kernel(
    x_ptr, weight_ptr, temperature_ptr, target_ptr, log_sum_ptr, scale_ptr, gradient_ptr, rows, first,
    V: tl.constexpr, D: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits of V columns, which begin at `first`, [rows, V]."""
    row_tile, tile = grouped_tile(tl.program_id(0), tl.cdiv(rows, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP)
    row = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _logits(x_ptr, weight_ptr, temperature_ptr, row, column, rows, V, D, OPERAND, BLOCK_D)
    target = tl.load(target_ptr + row, mask=row < rows, other=-1)
    log_sum = tl.load(log_sum_ptr + row, mask=row < rows, other=0.0)
    scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
    gradient = _softmax_gradient(x, target, first + column, log_sum, scale)
    at = row.to(tl.int64)[:, None] * V + column[None, :]
    tl.store(gradient_ptr + at, gradient, mask=(row < rows)[:, None] & (column < V)[None, :])


@jit("rows")
def _softmax_gradient_kernel(
    logits_ptr, target_ptr, log_sum_ptr, scale_ptr, gradient_ptr, rows,
    V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The same from logits in memory, [rows, V] to [rows, V], which may be the same memory."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = row.to(tl.int64)[:, None] * V + column[None, :]
    inside = (row < rows)[:, None] & (column < V)[None, :]
    target = tl.load(target_ptr + row, mask=row < rows, other=-1)
    log_sum = tl.load(log_sum_ptr + row, mask=row < rows, other=0.0)
    scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
    x = tl.load(logits_ptr + at, mask=inside, other=0.0)
    tl.store(gradient_ptr + at, _softmax_gradient(x, target, column, log_sum, scale), mask=inside)


def operands(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden [T, D] and W [V, D] in `dtype`, as the kernels read them."""
    return aligned(hidden.to(dtype)), aligned(weight.to(dtype))


def statistics(
    x: Tensor, matrix: Tensor, temperature: Tensor, targets: Tensor | None = None, logits: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x, matrix from `operands`, temperature FP32 [T, 1], targets int64 [T], logits FP32 [T, V]: memory for them.

    -> the logit of each target (undefined without targets), log sum exp of each row, its entropy: FP32 [T].
    """
    (rows, dim), vocabulary, blocks = x.shape, len(matrix), _TILES[matrix.dtype]
    tiles = divide_up(vocabulary, blocks["BLOCK_V"])
    chosen, log_sum, entropy = like(x, rows), like(x, rows), like(x, rows)
    top, total, weighted = like(x, rows, tiles), like(x, rows, tiles), like(x, rows, tiles)
    launch(
        _statistics_kernel, (divide_up(rows, blocks["BLOCK_T"]) * tiles,), x, matrix, temperature,
        chosen if targets is None else targets, chosen if logits is None else logits, chosen, top, total, weighted,
        rows, V=vocabulary, D=dim, OPERAND=triton_dtype(matrix.dtype), TARGETS=targets is not None,
        KEEP=logits is not None, GROUP=GROUP, **blocks,
    )  # fmt: skip
    block = next_power_of_two(tiles)
    height = max(1, _ELEMENTS // block)
    launch(
        _merge_statistics_kernel, (divide_up(rows, height),), top, total, weighted, log_sum, entropy, rows, TILES=tiles,
        BLOCK_S=block, BLOCK_R=height,
    )  # fmt: skip
    return chosen, log_sum, entropy


def gradient_from_hidden(
    x: Tensor, part: Tensor, temperature: Tensor, targets: Tensor, log_sum: Tensor, scale: Tensor, first: int
) -> Tensor:
    """Gradients of the logits that rows `part` [V', D] of W make, the first of which is row `first`, [T, V'] in its
    dtype. scale FP32 [T, 1]: the gradient of the log-probability, divided by the temperature."""
    (rows, dim), columns, blocks = x.shape, len(part), _TILES[part.dtype]
    gradient = like(x, rows, columns, dtype=part.dtype)
    launch(
        _recomputed_gradient_kernel, (divide_up(rows, blocks["BLOCK_T"]) * divide_up(columns, blocks["BLOCK_V"]),), x,
        part, temperature, targets, log_sum, scale, gradient, rows, first, V=columns, D=dim,
        OPERAND=triton_dtype(part.dtype), GROUP=GROUP, **blocks,
    )  # fmt: skip
    return gradient


def gradient_from_logits(logits: Tensor, targets: Tensor, log_sum: Tensor, scale: Tensor, gradient: Tensor) -> None:
    """The same for the whole vocabulary, from logits FP32 [T, V] to gradient [T, V], which may be the same memory."""
    rows, vocabulary = logits.shape
    block = min(next_power_of_two(vocabulary), _ELEMENTS)
    height = _ELEMENTS // block
    launch(
        _softmax_gradient_kernel, (divide_up(rows, height), divide_up(vocabulary, block)), logits, targets, log_sum,
        scale, gradient, rows, V=vocabulary, BLOCK_R=height, BLOCK_V=block,
    )  # fmt: skip


def add_gradients(gradient: Tensor, hidden: Tensor, part: Tensor, grad_hidden: Tensor, grad_weight: Tensor) -> None:
    """gradient [T, V'] of the logits of rows `part` [V', D] of W; hidden [T, D]: all in one dtype.

    grad_hidden FP32 [T, D] += gradient part        grad_weight FP32 [V', D] += gradient^T hidden
    """
    grad_hidden += multiply(gradient, part, torch.float32, transposed=True)
    grad_weight += weight_gradient(gradient, hidden, hidden.dtype, torch.float32)
