"""The experts of a mixture: y = sum over a token's experts of weight_e SwiGLU_e(x) (report 2.2.1).

Summed in FP32 in ascending expert order, so neither the order of scores nor who else is in the batch moves a bit
(design A2). On a GPU, rows are sorted by expert without a word to the host: each expert's rows fill whole tiles, and a
table says whose tile is whose.

Letters: T tokens, E experts, k experts per token, D model, F expert width, R rows grouped by expert, padding included.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops.autograd import apply
from ops.compiled import ZERO, compiled, number, plain, readable, share
from ops.dispatch import Path, choose
from ops.fp8 import GROUP, Fp8Weight, Quantized, quantize_rows, quantize_weight, swiglu_quantize
from ops.jit import aligned, divide_up, jit, launch, like, next_power_of_two, tl, triton_dtype
from ops.linear import grouped_linear
from ops.swiglu import swiglu
from ops.tiles import grouped_tile, tile_product


def experts_reference(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Token by token, in the dtype of x."""
    rows = []
    for row, chosen, scale in zip(x, ids, weights, strict=True):
        outputs = []
        for e, w in zip(chosen.tolist(), scale, strict=True):
            gate, up = (gate_up[e] @ row).chunk(2)
            outputs.append(w * (down[e] @ (gate * torch.sigmoid(gate) * up)))
        rows.append(torch.stack(outputs).sum(0))
    return torch.stack(rows)


# The CPU path.


Packed = tuple[Tensor | None, Tensor | None]  # gate_up and down


@dataclass(frozen=True)
class _ExpertRows:
    """Where assignments go: rows grouped by expert, ascending tokens inside each group. All int64."""

    source: Tensor  # [R] token of each row
    place: Tensor  # [T, k] row of each assignment
    bounds: Tensor  # [E + 1] first row of each expert, and the end


def _cpu_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, dtype: torch.dtype, rounded: bool,
    packed: Packed,
) -> Tensor:  # fmt: skip
    rows = _arrange(ids, len(gate_up))
    gathered = apply(_Permute, x.to(dtype), rows.source, rows.place)
    hidden = swiglu(grouped_linear(gathered, gate_up, rows.bounds, dtype, rounded, packed[0]))
    outputs = grouped_linear(hidden, down, rows.bounds, dtype, rounded, packed[1])
    y: Tensor = apply(_Combine, outputs, weights, rows.source, rows.place)
    return y


@compiled
def _arrange_kernel(begin, end, ids, source, place, bounds):
    """One item, all tokens: a counting sort."""
    tokens, top_k = ids.shape
    bounds[:] = 0
    for token in range(tokens):
        for slot in range(top_k):
            bounds[ids[token, slot] + 1] += 1
    for expert in range(1, len(bounds)):
        bounds[expert] += bounds[expert - 1]
    following = bounds.copy()
    for token in range(tokens):
        for slot in range(top_k):
            expert = ids[token, slot]
            place[token, slot], source[following[expert]] = following[expert], token
            following[expert] += 1


def _arrange(ids: Tensor, experts: int) -> _ExpertRows:
    source, place, bounds = torch.empty_like(ids.flatten()), torch.empty_like(ids), ids.new_empty(experts + 1)
    share(_arrange_kernel, 1, ids.numel(), ids.contiguous(), source, place, bounds)
    return _ExpertRows(source, place, bounds)


class _Permute(torch.autograd.Function):
    """Token rows to expert rows; backward sums a token's assignments in slot order instead of by scattered adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return _sum_rows(grad, torch.ones(place.shape), place).to(grad.dtype), None, None


@compiled
def _sum_rows_kernel(begin, end, rows, weights, place, y):
    """Items are tokens."""
    for token in range(begin, end):
        target = y[token]
        target[:] = ZERO
        for slot in range(place.shape[1]):
            row, weight = rows[place[token, slot]], weights[token, slot]
            for d in range(target.shape[0]):
                target[d] += number(row[d]) * weight


def _sum_rows(rows: Tensor, weights: Tensor, place: Tensor) -> Tensor:
    """y [T, D] = sum over slots, in order, of weights[:, slot] * rows[place[:, slot]], in FP32."""
    y = torch.empty(len(place), rows.shape[1])
    share(_sum_rows_kernel, len(y), 2 * place.numel() * rows.shape[1], readable(rows), plain(weights), place, y)
    return y


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, source, place)
        return _sum_rows(rows, weights, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, source, place = ctx.saved_tensors
        per_row = grad.index_select(0, source)
        grad_weights = (per_row * rows.float()).sum(-1)[place]
        row_weights = grad.new_empty(len(rows)).index_copy_(0, place.flatten(), weights.flatten())
        return per_row.mul_(row_weights.unsqueeze(1)).to(rows.dtype), grad_weights, None, None


# The Triton path: where rows go. A counting sort in four small kernels; a token has an expert once, so its row among
# the expert's is the number of earlier tokens that have it.


@dataclass(frozen=True)
class _Plan:
    """All int32, on the device."""

    source: Tensor  # [R] token of each row, -1 for padding
    place: Tensor  # [T, k] row of each assignment
    tile_expert: Tensor  # [R / ROWS] expert of each tile, -1 beyond the last
    begin: Tensor  # [E] first row of each expert
    used: Tensor  # [E] its rows without padding


@jit()
def _has(ids_ptr, token, inside, expert, TOP_K: tl.constexpr):
    """int32 [tokens, experts]: 1 where the token has the expert."""
    has = (token[:, None] < 0).to(tl.int32) + tl.zeros_like(expert)[None, :]
    for slot in tl.static_range(TOP_K):
        chosen = tl.load(ids_ptr + token * TOP_K + slot, mask=inside, other=-1).to(tl.int32)
        has = tl.where(chosen[:, None] == expert[None, :], 1, has)
    return has


@jit("tokens")
def _count_kernel(ids_ptr, count_ptr, tokens, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """count [tiles, BLOCK_E]: how many tokens of the tile have each expert."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    has = _has(ids_ptr, token, token < tokens, expert, TOP_K)
    tl.store(count_ptr + tl.program_id(0) * BLOCK_E + expert, tl.sum(has, axis=0))


@jit("tiles")
def _scan_kernel(
    count_ptr, before_ptr, used_ptr, tiles, E: tl.constexpr, BLOCK_E: tl.constexpr, STRIP: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """before [tiles, BLOCK_E]: the sum over earlier tiles; used [E]: over all. A program takes STRIP experts."""
    expert = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    total = tl.zeros([STRIP], dtype=tl.int32)
    for first in range(0, tiles, STEP):
        tile = first + tl.arange(0, STEP)
        at = tile[:, None] * BLOCK_E + expert[None, :]
        count = tl.load(count_ptr + at, mask=(tile < tiles)[:, None], other=0)
        tl.store(before_ptr + at, tl.cumsum(count, axis=0) - count + total[None, :], mask=(tile < tiles)[:, None])
        total += tl.sum(count, axis=0)
    tl.store(used_ptr + expert, total, mask=expert < E)


@jit("row_tiles")
def _table_kernel(
    used_ptr, begin_ptr, tile_expert_ptr, row_tiles, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, BLOCK_E)
    height = tl.cdiv(tl.load(used_ptr + expert, mask=expert < E, other=0), ROWS)
    end = tl.cumsum(height, axis=0)
    tl.store(begin_ptr + expert, (end - height) * ROWS, mask=expert < E)
    for first in range(0, row_tiles, STEP):
        tile = first + tl.arange(0, STEP)
        owner = tl.sum((end[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        tl.store(tile_expert_ptr + tile, tl.where(owner < E, owner, -1), mask=tile < row_tiles)


@jit("tokens")
def _place_kernel(
    ids_ptr, before_ptr, begin_ptr, source_ptr, place_ptr, tokens,
    E: tl.constexpr, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    has = _has(ids_ptr, token, token < tokens, expert, TOP_K)
    first = tl.load(begin_ptr + expert, mask=expert < E, other=0)
    first += tl.load(before_ptr + tl.program_id(0) * BLOCK_E + expert)
    row = first[None, :] + tl.cumsum(has, axis=0) - has
    for slot in tl.static_range(TOP_K):
        chosen = tl.load(ids_ptr + token * TOP_K + slot, mask=token < tokens, other=-1).to(tl.int32)
        place = tl.sum(tl.where(chosen[:, None] == expert[None, :], row, 0), axis=1)
        tl.store(place_ptr + token * TOP_K + slot, place, mask=token < tokens)
        tl.store(source_ptr + place, token, mask=token < tokens)


_ROWS = 64  # of a tile; an expert's rows are padded to a multiple
_SORT_TOKENS, _SORT_STEP, _SORT_STRIP = 16, 64, 32
_TABLE_STEP = 64


def _plan(ids: Tensor, experts: int) -> _Plan:
    ids, (tokens, top_k) = aligned(ids), ids.shape
    block, tiles = max(next_power_of_two(experts), _SORT_STRIP), divide_up(tokens, _SORT_TOKENS)
    row_tiles = (tokens * top_k + min(experts, tokens * top_k) * (_ROWS - 1)) // _ROWS
    count, before = (like(ids, tiles, block, dtype=torch.int32) for _ in range(2))
    begin, used = (like(ids, experts, dtype=torch.int32) for _ in range(2))
    tile_expert, place = like(ids, row_tiles, dtype=torch.int32), like(ids, tokens, top_k, dtype=torch.int32)
    source = torch.full((row_tiles * _ROWS,), -1, dtype=torch.int32, device=ids.device)
    sizes = {"TOP_K": top_k, "BLOCK_T": _SORT_TOKENS, "BLOCK_E": block}
    launch(_count_kernel, (tiles,), ids, count, tokens, warps=8, **sizes)
    launch(
        _scan_kernel, (block // _SORT_STRIP,), count, before, used, tiles, E=experts, BLOCK_E=block,
        STRIP=_SORT_STRIP, STEP=_SORT_STEP,
    )  # fmt: skip
    launch(
        _table_kernel, (1,), used, begin, tile_expert, row_tiles, E=experts, BLOCK_E=block, ROWS=_ROWS,
        STEP=_TABLE_STEP,
    )  # fmt: skip
    launch(_place_kernel, (tiles,), ids, before, begin, source, place, tokens, E=experts, warps=8, **sizes)
    return _Plan(source, place, tile_expert, begin, used)


# The Triton path: products. As in ops.matmul, tiles are computed transposed, y^T = W x^T.


@jit("row_tiles")
def _product_kernel(
    x_ptr, source_ptr, tile_expert_ptr, weight_ptr, y_ptr, row_tiles,
    N: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, OPERAND: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [R, N] = x W_e^T for each tile's expert. GATHER: x holds tokens, else rows. W [E, N, K] or [E, K, N]."""
    row_tile, column_tile = grouped_tile(tl.program_id(0), row_tiles, tl.cdiv(N, BLOCK_N), GROUP)
    expert = tl.load(tile_expert_ptr + row_tile)
    if expert >= 0:
        row = row_tile * ROWS + tl.arange(0, ROWS)
        source = tl.load(source_ptr + row)
        inside = (source >= 0)[None, :]
        place = (source if GATHER else row).to(tl.int64)[None, :]
        column = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        k = tl.arange(0, BLOCK_K)
        weight = weight_ptr + expert.to(tl.int64) * (N * K)
        weight += column + k[None, :] * N if TRANSPOSED else column * K + k[None, :]
        y = tile_product(
            weight, x_ptr + place * K + k[:, None], column < N, inside, 0, K, N if TRANSPOSED else 1, 1, None,
            BLOCK_N, ROWS, BLOCK_K, OPERAND, K % BLOCK_K == 0,
        )  # fmt: skip
        tl.store(y_ptr + row.to(tl.int64)[None, :] * N + column, y, mask=(column < N) & inside)


@jit()
def _gradient_kernel(
    grad_ptr, x_ptr, source_ptr, begin_ptr, used_ptr, y_ptr,
    N: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, OPERAND: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y_e [N, K] = grad^T x over the rows of expert e, ascending; zero for an expert without rows."""
    expert, tiles_k = tl.program_id(1), tl.cdiv(K, BLOCK_K)
    n = (tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    k = (tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    first, used = tl.load(begin_ptr + expert), tl.load(used_ptr + expert)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for begin in range(0, used, BLOCK_M):
        member = begin + tl.arange(0, BLOCK_M)
        row = (first + member).to(tl.int64)
        place = row
        if GATHER:
            place = tl.load(source_ptr + row, mask=member < used, other=0).to(tl.int64)
        grad = tl.load(grad_ptr + row[None, :] * N + n, mask=(member < used)[None, :] & (n < N), other=0.0)
        x = tl.load(x_ptr + place[:, None] * K + k, mask=(member < used)[:, None] & (k < K), other=0.0)
        acc = tl.dot(grad.to(OPERAND), x.to(OPERAND), acc, input_precision="ieee")
    tl.store(y_ptr + expert.to(tl.int64) * (N * K) + n * K + k, acc, mask=(n < N) & (k < K))


@jit()
def _sum_kernel(
    rows_ptr, weights_ptr, place_ptr, y_ptr, D: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y [T, D] = sum over slots, in order, of a token's rows, each times its weight or not."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        row = tl.load(place_ptr + token * TOP_K + slot).to(tl.int64)
        x = tl.load(rows_ptr + row * D + column, mask=column < D, other=0.0).to(tl.float32)
        total += x * tl.load(weights_ptr + token * TOP_K + slot) if WEIGHTED else x
    tl.store(y_ptr + token * D + column, total, mask=column < D)


@jit()
def _spread_kernel(
    grad_ptr, rows_ptr, weights_ptr, place_ptr, grad_rows_ptr, grad_weights_ptr, D: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The way back of _sum_kernel: weight * grad to each row, and grad . row to each weight."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    grad = tl.load(grad_ptr + token * D + column, mask=column < D, other=0.0).to(tl.float32)
    for slot in tl.static_range(TOP_K):
        row = tl.load(place_ptr + token * TOP_K + slot).to(tl.int64)
        x = tl.load(rows_ptr + row * D + column, mask=column < D, other=0.0).to(tl.float32)
        tl.store(grad_weights_ptr + token * TOP_K + slot, tl.sum(grad * x, axis=0))
        weight = tl.load(weights_ptr + token * TOP_K + slot)
        tl.store(grad_rows_ptr + row * D + column, grad * weight, mask=column < D)


@dataclass(frozen=True)
class _Tile:
    out: int
    inner: int
    warps: int
    stages: int


_TILES = {torch.bfloat16: _Tile(128, 64, 4, 4), torch.float32: _Tile(64, 32, 4, 3)}
_WIDE = 8  # tiles of rows that are walked together while a tile of a weight is in the L2 cache
_SUM_BLOCK = 1024


def _product(x: Tensor, weight: Tensor, plan: _Plan, gather: bool, transposed: bool) -> Tensor:
    _, width, inner = weight.shape
    if transposed:
        width, inner = inner, width
    tile, row_tiles = _TILES[weight.dtype], len(plan.tile_expert)
    y = like(x, len(plan.source), width, dtype=weight.dtype)
    launch(
        _product_kernel, (row_tiles * divide_up(width, tile.out),), x, plan.source, plan.tile_expert, weight, y,
        row_tiles, N=width, K=inner, GATHER=gather, TRANSPOSED=transposed, OPERAND=triton_dtype(weight.dtype),
        GROUP=_WIDE, BLOCK_N=tile.out, ROWS=_ROWS, BLOCK_K=tile.inner, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return y


def _weight_gradient(grad: Tensor, x: Tensor, plan: _Plan, gather: bool, out: torch.dtype) -> Tensor:
    experts, width, inner = len(plan.begin), grad.shape[1], x.shape[1]
    tile = _TILES[x.dtype]
    y = like(x, experts, width, inner, dtype=out)
    launch(
        _gradient_kernel, (divide_up(width, tile.out) * divide_up(inner, tile.out), experts), grad, x, plan.source,
        plan.begin, plan.used, y, N=width, K=inner, GATHER=gather, OPERAND=triton_dtype(x.dtype), BLOCK_N=tile.out,
        BLOCK_K=tile.out, BLOCK_M=_ROWS if x.dtype == torch.bfloat16 else 32, warps=8, stages=3,
    )  # fmt: skip
    return y


def _sum_slots(rows: Tensor, weights: Tensor | None, place: Tensor, dtype: torch.dtype) -> Tensor:
    (tokens, top_k), width = place.shape, rows.shape[1]
    y = like(rows, tokens, width, dtype=dtype)
    block = min(next_power_of_two(width), _SUM_BLOCK)
    launch(
        _sum_kernel, (tokens, divide_up(width, block)), rows, rows if weights is None else weights, place, y, D=width,
        TOP_K=top_k, WEIGHTED=weights is not None, BLOCK_D=block,
    )  # fmt: skip
    return y


class _GroupedLinear(torch.autograd.Function):
    """x [T, K] (gathered) or [R, K] -> [R, N] in `dtype`; padding rows stay unwritten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, plan: _Plan, gather: bool, dtype: torch.dtype) -> Tensor:
        operand, matrices = aligned(x.to(dtype)), aligned(weight.to(dtype))
        ctx.save_for_backward(operand, matrices)
        ctx.plan, ctx.gather, ctx.dtypes = plan, gather, (x.dtype, weight.dtype)
        return _product(operand, matrices, plan, gather, transposed=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operand, matrices = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(aligned(grad), matrices, ctx.plan, gather=False, transposed=True)
            if ctx.gather:
                grad_x = _sum_slots(grad_x, None, ctx.plan.place, torch.float32)
            grad_x = grad_x.to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(aligned(grad), operand, ctx.plan, ctx.gather, ctx.dtypes[1])
        return grad_x, grad_weight, None, None, None


class _SumSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, plan: _Plan) -> Tensor:
        weights = aligned(weights)
        ctx.save_for_backward(rows, weights, plan.place)
        return _sum_slots(rows, weights, plan.place, torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights, place = ctx.saved_tensors
        (tokens, top_k), width = place.shape, rows.shape[1]
        grad_rows, grad_weights = like(rows, *rows.shape, dtype=rows.dtype), like(rows, tokens, top_k)
        launch(
            _spread_kernel, (tokens,), aligned(grad), rows, weights, place, grad_rows, grad_weights, D=width,
            TOP_K=top_k, BLOCK_D=next_power_of_two(width),
        )  # fmt: skip
        return grad_rows, grad_weights, None


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    rounded: bool = False,
    packed: Packed = (None, None),
) -> Tensor:
    """x FP32 [T, D], gate_up [E, 2F, D], down [E, D, F], ids and weights [T, k] from `route` -> FP32 [T, D].

    rounded: both matrices hold numbers of `dtype` already, as in `linear`; packed: `pack_weight` of both.
    """
    if choose("experts", x) is not Path.TRITON:
        return _cpu_experts(x, gate_up, down, ids, weights, dtype, rounded, packed)
    plan = _plan(ids, gate_up.shape[0])
    hidden = swiglu(apply(_GroupedLinear, x, gate_up, plan, True, dtype))
    y: Tensor = apply(_SumSlots, apply(_GroupedLinear, hidden, down, plan, False, dtype), weights, plan)
    return y


# FP8, for engines: weights quantised once per version, activations by rows (report 3.2; Ring-2.6 rolls out so).


@jit("row_tiles")
def _fp8_kernel(
    x_ptr, x_scale_ptr, source_ptr, tile_expert_ptr, weight_ptr, weight_scale_ptr, y_ptr, row_tiles,
    N: tl.constexpr, GROUPS: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """As _product_kernel, 128 outputs to a program, so that each 128 of K has one scale of the weight."""
    row_tile, column_tile = grouped_tile(tl.program_id(0), row_tiles, N // 128, WIDE)
    expert = tl.load(tile_expert_ptr + row_tile)
    if expert >= 0:
        row = row_tile * ROWS + tl.arange(0, ROWS)
        source = tl.load(source_ptr + row)
        inside = (source >= 0)[None, :]
        place = (source if GATHER else row).to(tl.int64)
        column = (column_tile * 128 + tl.arange(0, 128))[:, None]
        k = tl.arange(0, 128)
        weight_at = weight_ptr + (expert.to(tl.int64) * N + column) * (GROUPS * 128) + k[None, :]
        x_at = x_ptr + place[None, :] * (GROUPS * 128) + k[:, None]
        scale_at = weight_scale_ptr + (expert * (N // 128) + column_tile) * GROUPS
        acc = tl.zeros([128, ROWS], dtype=tl.float32)
        for group in range(GROUPS):
            w = tl.load(weight_at + group * 128)
            x = tl.load(x_at + group * 128, mask=inside, other=0.0)
            scale = tl.load(x_scale_ptr + place * GROUPS + group, mask=source >= 0, other=0.0)
            acc += tl.dot(w, x) * (tl.load(scale_at + group) * scale)[None, :]
        tl.store(y_ptr + row.to(tl.int64)[None, :] * N + column, acc, mask=inside)


def _fp8_product(x: Quantized, weight: Fp8Weight, experts: int, plan: _Plan, gather: bool) -> Tensor:
    width, row_tiles = weight.shape[0] // experts, len(plan.tile_expert)
    y = like(x.values, len(plan.source), width, dtype=torch.bfloat16)
    launch(
        _fp8_kernel, (row_tiles * (width // GROUP),), x.values, x.scale, plan.source, plan.tile_expert,
        weight.rows.values, weight.rows.scale, y, row_tiles, N=width, GROUPS=x.scale.shape[1], GATHER=gather,
        WIDE=_WIDE, ROWS=_ROWS, warps=4, stages=4,
    )  # fmt: skip
    return y


def fp8_experts(x: Tensor, gate_up: Fp8Weight, down: Fp8Weight, ids: Tensor, weights: Tensor, num: int) -> Tensor:
    """`experts` without gradient, with the weights of `num` experts, one below the other, from `quantize_weight`:
    gate_up [E * 2F, D], down [E * D, F]; D and 2F multiples of 128, so that no block spans two experts. -> FP32 [T, D].
    """
    if any(weight.shape[0] // num % GROUP for weight in (gate_up, down)):
        raise ValueError(
            f"{num} experts with {gate_up.shape[0] // num} and {down.shape[0] // num} outputs: FP8 experts need "
            f"multiples of {GROUP}, so that no block of the quantisation spans two experts"
        )
    if choose("experts", x) is not Path.TRITON:
        # Products of e4m3 values times scales, in FP32: the same sums in another order.
        gate_up_matrix, down_matrix = (w.rows.dequantize(w.shape[1]).view(num, -1, w.shape[1]) for w in (gate_up, down))
        return _dequantized_experts(x, gate_up_matrix, down_matrix, ids, weights)
    plan = _plan(ids, num)
    hidden = swiglu_quantize(_fp8_product(quantize_rows(x), gate_up, num, plan, gather=True))
    rows = _fp8_product(hidden, down, num, plan, gather=False)
    return _sum_slots(rows, aligned(weights), plan.place, torch.float32)


def _dequantized_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = _arrange(ids, len(gate_up))
    x = quantize_rows(x).dequantize(x.shape[1]).index_select(0, rows.source)
    hidden = grouped_linear(x, gate_up, rows.bounds, torch.float32).bfloat16()
    hidden = swiglu_quantize(hidden).dequantize(down.shape[2])
    y = grouped_linear(hidden, down, rows.bounds, torch.float32).bfloat16()
    combined: Tensor = apply(_Combine, y, weights, rows.source, rows.place)
    return combined


class _TrainedFp8Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate_up, down, weights, ids)
        gate_up_fp8, down_fp8 = (quantize_weight(weight.flatten(0, 1)) for weight in (gate_up, down))
        return fp8_experts(x, gate_up_fp8, down_fp8, ids, weights, len(gate_up))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, ids = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in inputs]
            x, gate_up, down, weights = leaves
            y = experts(x, gate_up, down, ids, weights, torch.bfloat16)
        by_x, by_gate_up, by_down, by_weights = torch.autograd.grad(y, leaves, grad)
        return by_x, by_gate_up, by_down, None, by_weights


def trained_fp8_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """`fp8_experts` of weights gate_up [E, 2F, D] and down [E, D, F] that are not quantised yet, with gradients: those
    of `experts` in BF16 at the same place, as quantisation has none of its own (straight through)."""
    y: Tensor = apply(_TrainedFp8Experts, x, gate_up, down, ids, weights)
    return y
