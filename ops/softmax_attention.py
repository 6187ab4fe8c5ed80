"""Causal softmax attention with grouped query heads, over key blocks counted from position 0 (design A4).

    o_i = sum_{j <= i} softmax_j(d^-1/2 q_i k_j) v_j        query head h reads key-value head h // (H / K)

q [T, H, d], k, v [T, K, d] -> o FP32 [T, H, d]. Keys lie in blocks of C positions. Sums over keys run in an order that
positions alone decide, and a key that a row must not see adds nothing. So a row's bits depend on its own sequence
alone, and a query row of decode equals the same row in training.

The CPU path computes in FP32, and keeps the keys of a block in panels. The Triton path multiplies in the dtype of v
(BF16, or FP32 without TF32) and accumulates, exponentiates and merges in FP32; every (query tile, key block) pair is
one product of one shape there.

Letters: S sequences, T tokens, N tiles, H heads, K key-value heads, G = H / K, C block length, d head dimension; on the
Triton path P heads of a tile.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.autograd import apply
from ops.compiled import (
    TOGETHER,
    ZERO,
    add_weighted,
    compiled,
    exp,
    f32,
    largest,
    number,
    panels_of,
    plain,
    readable,
    score_keys,
    share,
    stored,
    sum_16,
)
from ops.dispatch import Path, choose
from ops.jit import aligned, divide_up, jit, launch, like, next_power_of_two, tl, triton_dtype
from ops.layout import ChunkLayout


@dataclass(frozen=True)
class PagedCache:
    """One layer's key and value blocks, and the blocks of each sequence of the batch in order of position."""

    key: Tensor  # FP32 or BF16 [blocks, K, C, d], contiguous
    value: Tensor  # like key
    block_table: Tensor | np.ndarray  # integers [S, >= blocks needed]; kernels want a tensor beside the pools


def softmax_attention_reference(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Dense attention, sequence by sequence, in the dtype of q."""
    groups, outputs = q.shape[1] // k.shape[1], []
    for qs, ks, vs in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        ks, vs = (x.repeat_interleave(groups, dim=1) for x in (ks, vs))
        scores = torch.einsum("ihd,jhd->hij", qs, ks) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(len(qs), len(qs)).triu(1).bool(), float("-inf"))
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), vs))
    return torch.cat(outputs)


# The CPU path: one kernel for training, prefill and decode. It takes some rows of a tile and a key-value head at once,
# which reads keys less often and moves no bit, as every row has sums of its own. A score is summed over d in order,
# weights and weighted values in order of position, segment by segment.

SEGMENT = 1024  # positions that are summed before they join the total


@compiled
def _gather_queries(q, begin, head, row, rows, groups, scale, out):
    """Rows row .. row + rows - 1 of a tile that begins at token `begin`: row r is token r // G, head r % G."""
    for r in range(rows):
        query = q[begin + (row + r) // groups, head * groups + (row + r) % groups]
        for d in range(q.shape[2]):
            out[r, d] = query[d] * scale


@compiled
def _exponentiate(row, count, segment):
    """Scores to weights relative to the largest, of which the first `count` are seen; returns it and their sum."""
    top, total = largest(row[:count]), ZERO
    for j in range(count):
        row[j] = exp(row[j] - top)
    for begin in range(0, count, segment):
        total += sum_16(row[begin : min(begin + segment, count)])
    return top, total


@compiled
def _to_next(b, table, head, next_table, next_head, next_seen, pool):
    """From block b of one sequence to that of the next item, in numbers of the pool; 0 if it has none."""
    _, heads, chunk, dim = pool.shape
    return ((next_table[b] - table[b]) * heads + next_head - head) * chunk * dim if b * chunk < next_seen else 0


@compiled
def _attend_rows(rows, scores, keys_seen, table, values, head, following, segment, part, sums):
    """Weighted values of `rows` rows, unnormalised, into sums [rows, d]; row r sees keys_seen[r], row 0 least."""
    chunk = values.shape[2]
    per_segment = segment // chunk
    blocks = (keys_seen[rows - 1] + chunk - 1) // chunk
    sums[:rows] = ZERO
    for begin in range(0, blocks, per_segment):
        part[:rows] = ZERO
        for b in range(begin, min(begin + per_segment, blocks)):
            block = values[table[b], head]
            least = max(0, min(chunk, keys_seen[0] - b * chunk))
            add_weighted(rows, scores, b * chunk, block, least, part, _to_next(b, table, head, *following, values))
            for r in range(1, rows):  # that see more
                more = min(chunk, keys_seen[r] - b * chunk) - least
                if more > 0:
                    add_weighted(1, scores[r : r + 1], b * chunk + least, block[least:], more, part[r : r + 1])
        sums[:rows] += part[:rows]


@compiled
def _append(key, value, row, keys, values):
    """A key [d] and its value to a row of their head's block, [C / W, d, W] and [C, d]."""
    panel, column, target = keys[row // keys.shape[2]], row % keys.shape[2], values[row]
    for d in range(key.shape[0]):
        panel[d, column], target[d] = stored(number(key[d]), keys), stored(number(value[d]), values)


@compiled
def _cpu_append_kernel(begin, end, k, v, table, tokens_sequence, positions, keys, values):
    """Items are tokens."""
    chunk = values.shape[2]
    for token in range(begin, end):
        block = table[tokens_sequence[token], positions[token] // chunk]
        for head in range(k.shape[1]):
            _append(k[token, head], v[token, head], positions[token] % chunk, keys[block, head], values[block, head])


@compiled
def _cpu_attention_kernel(
    begin, end, q, k, v, appends, keys, values, table, tile_sequence, tile_chunk, begins, starts, lengths, scale,
    segment, out, log_sum,
):  # fmt: skip
    """Items are pairs of a tile and a key-value head. keys [blocks, K, C / W, d, W], values [blocks, K, C, d].
    appends: in decode, a tile's only key is put into its block on the way."""
    kv_heads, chunk, dim = values.shape[1:]
    groups = q.shape[1] // kv_heads
    queries, sums, part = np.empty((TOGETHER, dim), f32), np.empty((TOGETHER, dim), f32), np.empty((TOGETHER, dim), f32)
    keys_seen, tops, totals = np.empty(TOGETHER, np.int64), np.empty(TOGETHER, f32), np.empty(TOGETHER, f32)
    scores = np.empty((TOGETHER, (tile_chunk.max() + 1) * chunk), f32)
    for item in range(begin, end):
        tile, head = item // kv_heads, item % kv_heads
        sequence, blocks = tile_sequence[tile], tile_chunk[tile] + 1
        position = max(starts[sequence], (blocks - 1) * chunk)
        tokens = min(starts[sequence] + lengths[sequence], blocks * chunk) - position
        token = begins[sequence] + position - starts[sequence]
        following = table[sequence], head, 0
        if appends and item + 1 < end:  # decode reads all keys once: the next item's come while this one is computed
            other = tile_sequence[(item + 1) // kv_heads]
            following = table[other], (item + 1) % kv_heads, starts[other] + 1
        if appends:
            block = table[sequence, blocks - 1]
            _append(k[token, head], v[token, head], position % chunk, keys[block, head], values[block, head])
        for row in range(0, tokens * groups, TOGETHER):
            rows = min(TOGETHER, tokens * groups - row)
            _gather_queries(q, token, head, row, rows, groups, scale, queries)
            for r in range(rows):
                keys_seen[r] = position + (row + r) // groups + 1
            for b in range(blocks):
                count = min(chunk, keys_seen[rows - 1] - b * chunk)
                ahead = _to_next(b, table[sequence], head, *following, values)
                score_keys(rows, queries, keys[table[sequence, b], head], count, scores, b * chunk, ahead)
            for r in range(rows):
                tops[r], totals[r] = _exponentiate(scores[r], keys_seen[r], segment)
            _attend_rows(rows, scores, keys_seen, table[sequence], values, head, following, segment, part, sums)
            for r in range(rows):
                at, query_head = token + (row + r) // groups, head * groups + (row + r) % groups
                log_sum[at, query_head] = tops[r] + np.log(totals[r])
                for d in range(dim):
                    out[at, query_head, d] = sums[r, d] / totals[r]


def _cpu_attend(q: Tensor, k: Tensor, v: Tensor, layout: ChunkLayout, cache: PagedCache) -> tuple[Tensor, Tensor]:
    """Takes in the new keys and values; outputs FP32 [T, H, d] and log-sum-exps [T, H]."""
    table = layout.planned("blocks", cache.block_table, lambda: torch.as_tensor(cache.block_table).numpy())
    q, k, v = plain(q), readable(k), readable(v)
    keys, (tokens, heads, dim) = panels_of(cache.key), q.shape
    if not layout.is_decode:  # else a thread may need what another has not put there yet
        places = table, layout.token_sequence, layout.position_ids
        share(_cpu_append_kernel, tokens, 2 * k.numel(), k, v, *places, keys, cache.value)
    out, log_sum = torch.empty_like(q), q.new_empty(tokens, heads)
    operations = 4 * heads * dim * layout.keys_seen
    share(
        _cpu_attention_kernel, layout.num_tiles * k.shape[1], operations, q, k, v, layout.is_decode, keys, cache.value,
        table, layout.tile_sequence, layout.tile_chunk, layout.begins, layout.starts, layout.lengths, f32(dim**-0.5),
        max(SEGMENT, layout.chunk_size), out, log_sum,
    )  # fmt: skip
    return out, log_sum


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, layout: ChunkLayout) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and what the backward pass needs. The sequence's own tiles are its key blocks."""
    shape = layout.num_tiles, k.shape[1], layout.chunk_size, k.shape[2]
    own = PagedCache(k.new_zeros(shape), v.new_zeros(shape), layout.sequence_tiles)
    out, log_sum = _cpu_attend(q, k, v, layout, own)
    return out, (q, k, own.value, out, log_sum)


def _cpu_backward(grad: Tensor, saved: tuple[Tensor, ...], layout: ChunkLayout) -> tuple[Tensor, ...]:
    q, k, v, out, log_sum = (x.float() for x in saved)
    tiled = (q * q.shape[-1] ** -0.5, k, grad, out, log_sum.unsqueeze(-1))
    q, k, grad, out, log_sum = (layout.into_tiles(x) for x in tiled)
    mean = (grad * out).sum(-1, keepdim=True)
    grads = torch.zeros_like(q), torch.zeros_like(v), torch.zeros_like(v)
    for distance in range(len(layout.ranks)):
        _backward_at_distance(distance, q, k, v, grad, mean, log_sum, grads, layout)
    dq, dk, dv = (layout.from_tiles(x) for x in grads)
    return dq.mul_(q.shape[-1] ** -0.5), dk, dv


def _backward_at_distance(
    distance: int, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mean: Tensor, log_sum: Tensor,
    grads: tuple[Tensor, Tensor, Tensor], layout: ChunkLayout,
) -> None:  # fmt: skip
    """Adds what query tiles contribute with the key block `distance` tiles before them: one pair per tile."""
    table = layout.sequence_tiles
    query = torch.from_numpy(table[:, distance:][table[:, distance:] >= 0])
    key = torch.from_numpy(table[:, : table.shape[1] - distance][table[:, distance:] >= 0])
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]

    def by_kv_head(x: Tensor) -> Tensor:
        return x.index_select(0, query).unflatten(1, (kv_heads, groups)).flatten(2, 3)  # [P, K, G * C, ...]

    queries, grad_out, keys = by_kv_head(q), by_kv_head(grad), k.index_select(0, key)
    weights = (queries @ keys.transpose(2, 3)).sub_(by_kv_head(log_sum)).exp_()
    if distance == 0:
        weights.unflatten(2, (groups, -1)).tril_()
    grads[2].index_add_(0, key, (weights.transpose(2, 3) @ grad_out))
    grad_scores = (grad_out @ v.index_select(0, key).transpose(2, 3)).sub_(by_kv_head(mean)).mul_(weights)
    grads[1].index_add_(0, key, (grad_scores.transpose(2, 3) @ queries))
    grads[0].index_add_(0, query, (grad_scores @ keys).view(-1, *q.shape[1:]))


# The Triton path. A program owns a query tile, always of one shape: C positions of P heads that share their keys, or in
# decode one position of all G of them, other rows idle. It walks the key blocks from position 0 with an online softmax
# that starts afresh every SEGMENT positions, and merges the segments in ascending order. Where the tiles are too few to
# fill a GPU, a program takes one segment and a second kernel merges them: the same sums, hence the same bits. Exponents
# and log-sums are those of 2. A weight is rounded to the operand type for its product, not for the sum of weights.

# Rows of a tile. BF16: two warpgroups load half the keys that one alone would. FP32 has no tensor cores to feed.
ROWS = {torch.bfloat16: 128, torch.float32: 64}
_MERGE_ROWS = 16
_DECODE_PROGRAMS, _TILE_PROGRAMS = 1024, 128  # enough to fill a GPU; splitting whole tiles costs more scratch memory


@jit()
def _place(begins_ptr, lengths_ptr, starts_ptr, tile_sequence_ptr, tile_chunk_ptr, tile):
    """Of a tile: its sequence and chunk, the sequence's first token in the batch, its first position and its end."""
    sequence = tl.load(tile_sequence_ptr + tile)
    start = tl.load(starts_ptr + sequence)
    end = start + tl.load(lengths_ptr + sequence)
    return sequence, tl.load(tile_chunk_ptr + tile), tl.load(begins_ptr + sequence), start, end


@jit()
def _query_rows(
    x, begin, start, end, chunk, unit,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, P: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Of rows x of a tile: index of row 0 in [T, H], theirs relative to it, place in the chunk, are they tokens.

    unit: which P heads; in decode, which key-value head.
    """
    if DECODE:
        first, at = begin.to(tl.int64) * H + unit * (H // K), x
        row, valid = start - chunk * C + x * 0, x < H // K
    else:
        first, at = ((begin - start).to(tl.int64) + chunk * C) * H + unit * P, x % C * H + x // C
        row, valid = x % C, (chunk * C + x % C >= start) & (chunk * C + x % C < end)
    return first, at, row, valid


@jit()
def _load_rows(ptr, at, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr):
    """Rows of D values that begin at `at`, zero where not valid: what lies there may be NaN -> [rows, BLOCK_D]."""
    column = tl.arange(0, BLOCK_D)
    mask = valid[:, None] if D == BLOCK_D else valid[:, None] & (column < D)[None, :]
    return tl.load(ptr + at[:, None] + column[None, :], mask=mask, other=0.0).to(OPERAND)


@jit()
def _store_rows(ptr, at, x, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    mask = valid[:, None] if D == BLOCK_D else valid[:, None] & (column < D)[None, :]
    tl.store(ptr + at[:, None] + column[None, :], x, mask=mask)


@jit()
def _attend(
    q, top, total, acc, block, row, k_ptr, v_ptr, table_ptr, end, scale,
    K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, PAGED: tl.constexpr, OWN: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """One key block more: row maximum (exponent of 2), sum of weights, and weighted values unnormalised.

    OWN: the block of the queries themselves, which may end early and holds keys after a query.
    """
    key = tl.arange(0, C)
    known = block * C + key < end if OWN else key < C
    if PAGED:
        place, stride = tl.load(table_ptr + block).to(tl.int64) * (K * C * D), D
    else:
        place, stride = tl.cast(block, tl.int64) * (C * K * D), K * D
    k = _load_rows(k_ptr + place, key * stride, known, D, BLOCK_D, OPERAND)
    v = _load_rows(v_ptr + place, key * stride, known, D, BLOCK_D, OPERAND)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if OWN:
        scores = tl.where(key[None, :] <= row[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(tl.fma(scores, scale, -new_top[:, None]))
    shrink = tl.exp2(top - new_top)
    acc = tl.dot(weights.to(OPERAND), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total * shrink + tl.sum(weights, axis=1), acc


@jit()
def _merge(top, total, acc, next_top, next_total, next_acc):
    """Two segments into one; (-inf, 0, 0) is none."""
    new_top = tl.maximum(top, next_top)
    a, b = tl.exp2(top - new_top), tl.exp2(next_top - new_top)
    return new_top, total * a + next_total * b, acc * a[:, None] + next_acc * b[:, None]


@jit()
def _no_segment(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    top = tl.full([ROWS], float("-inf"), tl.float32)
    return top, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_D], tl.float32)


@jit("tiles", "tokens", "width")
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, begins_ptr, lengths_ptr, starts_ptr, tile_sequence_ptr, tile_chunk_ptr,
    o_ptr, log_sum_ptr, part_ptr, part_stats_ptr, tiles, tokens, width, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    BLOCKS: tl.constexpr, KEPT: tl.constexpr, PAGED: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (tile and head unit, segment): without SPLIT there is one program for all segments of BLOCKS blocks.

    Longest tiles come first. With SPLIT, KEPT rows of each segment go to part [segments, units, KEPT, D] unnormalised,
    and their maxima and sums to part_stats [segments, 2, units, KEPT].
    """
    UNITS: tl.constexpr = K if DECODE else H // P
    tile, unit = tiles - 1 - tl.program_id(0) // UNITS, tl.program_id(0) % UNITS
    sequence, chunk, begin, start, end = _place(
        begins_ptr, lengths_ptr, starts_ptr, tile_sequence_ptr, tile_chunk_ptr, tile
    )
    segment = tl.program_id(1) if SPLIT else 0
    if segment * BLOCKS > chunk:
        return
    x = tl.arange(0, P * C)
    first, at, row, valid = _query_rows(x, begin, start, end, chunk, unit, H, K, C, P, DECODE)
    q = _load_rows(q_ptr + first * D, at * D, valid, D, BLOCK_D, OPERAND)
    kv_head = unit if DECODE else unit * P // (H // K)
    place = kv_head * (C * D) if PAGED else (begin.to(tl.int64) * K + kv_head) * D
    k_ptr, v_ptr, table_ptr = k_ptr + place, v_ptr + place, table_ptr + sequence.to(tl.int64) * width
    top, total, acc = _no_segment(P * C, BLOCK_D)
    all_top, all_total, all_acc = top, total, acc
    for block in range(segment * BLOCKS, tl.minimum(segment * BLOCKS + BLOCKS, chunk) if SPLIT else chunk):
        top, total, acc = _attend(
            q, top, total, acc, block, row, k_ptr, v_ptr, table_ptr, end, scale,
            K, D, BLOCK_D, C, PAGED, False, OPERAND,
        )  # fmt: skip
        if not SPLIT and block % BLOCKS == BLOCKS - 1:
            all_top, all_total, all_acc = _merge(all_top, all_total, all_acc, top, total, acc)
            top, total, acc = _no_segment(P * C, BLOCK_D)
    if not SPLIT or segment == chunk // BLOCKS:
        top, total, acc = _attend(
            q, top, total, acc, chunk, row, k_ptr, v_ptr, table_ptr, end, scale,
            K, D, BLOCK_D, C, PAGED, True, OPERAND,
        )  # fmt: skip
    if SPLIT:
        units = tiles.to(tl.int64) * UNITS
        part = (segment * units + tile * UNITS + unit) * KEPT
        _store_rows(part_ptr + part * D, x * D, acc, x < KEPT, D, BLOCK_D)
        part += segment * units * KEPT
        tl.store(part_stats_ptr + part + x, top, mask=x < KEPT)
        tl.store(part_stats_ptr + part + units * KEPT + x, total, mask=x < KEPT)
    else:
        top, total, acc = _merge(all_top, all_total, all_acc, top, total, acc)
        _store_rows(o_ptr + first * D, at * D, tl.div_rn(acc, total[:, None]), valid, D, BLOCK_D)
        if not PAGED:
            log_sum = log_sum_ptr + (unit * P).to(tl.int64) * tokens + begin - start + chunk * C
            tl.store(log_sum + x // C * tokens + row, top + tl.log2(total), mask=valid)


@jit("tiles")
def _merge_kernel(
    part_ptr, part_stats_ptr, begins_ptr, lengths_ptr, starts_ptr, tile_sequence_ptr, tile_chunk_ptr, o_ptr, tiles,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    BLOCKS: tl.constexpr, KEPT: tl.constexpr, DECODE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (tile and head unit, block of its rows): what the forward kernel does at the end of each segment."""
    UNITS: tl.constexpr = K if DECODE else H // P
    tile, unit = tl.program_id(0) // UNITS, tl.program_id(0) % UNITS
    _, chunk, begin, start, end = _place(begins_ptr, lengths_ptr, starts_ptr, tile_sequence_ptr, tile_chunk_ptr, tile)
    x, units = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R), tiles.to(tl.int64) * UNITS
    top, total, acc = _no_segment(BLOCK_R, BLOCK_D)
    for segment in tl.range(chunk // BLOCKS + 1, num_stages=4):
        part = (segment * units + tl.program_id(0)) * KEPT
        next_acc = _load_rows(part_ptr + part * D, x * D, x < KEPT, D, BLOCK_D, tl.float32)
        part += segment * units * KEPT
        next_top = tl.load(part_stats_ptr + part + x, mask=x < KEPT, other=0.0)
        next_total = tl.load(part_stats_ptr + part + units * KEPT + x, mask=x < KEPT, other=0.0)
        top, total, acc = _merge(top, total, acc, next_top, next_total, next_acc)
    first, at, _, valid = _query_rows(x, begin, start, end, chunk, unit, H, K, C, P, DECODE)
    valid = valid & (x < KEPT)
    _store_rows(o_ptr + first * D, at * D, tl.div_rn(acc, total[:, None]), valid, D, BLOCK_D)


@jit("width")
def _append_kernel(
    k_ptr, v_ptr, key_ptr, value_ptr, table_ptr, begins_ptr, lengths_ptr, starts_ptr, tile_sequence_ptr,
    tile_chunk_ptr, width, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Program (tile, key-value head) writes the new keys and values of a tile to their page."""
    kv_head = tl.program_id(1)
    sequence, chunk, begin, start, end = _place(
        begins_ptr, lengths_ptr, starts_ptr, tile_sequence_ptr, tile_chunk_ptr, tl.program_id(0)
    )
    x = tl.arange(0, C)
    first, at, row, valid = _query_rows(x, begin, start, end, chunk, kv_head, K, K, C, 1, False)
    page = tl.load(table_ptr + sequence.to(tl.int64) * width + chunk).to(tl.int64)
    place = (page * K + kv_head) * (C * D)
    k = _load_rows(k_ptr + first * D, at * D, valid, D, BLOCK_D, key_ptr.dtype.element_ty)
    v = _load_rows(v_ptr + first * D, at * D, valid, D, BLOCK_D, value_ptr.dtype.element_ty)
    _store_rows(key_ptr + place, row * D, k, valid, D, BLOCK_D)
    _store_rows(value_ptr + place, row * D, v, valid, D, BLOCK_D)


@jit("rows", "tokens")
def _delta_kernel(
    grad_ptr, o_ptr, low_ptr, delta_ptr, rows, tokens,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """grad as an operand, and delta [H, T]: the product of that with the output, row by row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    low = _load_rows(grad_ptr, row * D, row < rows, D, BLOCK_D, OPERAND)
    o = _load_rows(o_ptr, row * D, row < rows, D, BLOCK_D, tl.float32)
    _store_rows(low_ptr, row * D, low, row < rows, D, BLOCK_D)
    tl.store(delta_ptr + row % H * tokens + row // H, tl.sum(low.to(tl.float32) * o, axis=1), mask=row < rows)


@jit("tiles", "tokens")
def _query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, log_sum_ptr, delta_ptr, begins_ptr, lengths_ptr, starts_ptr, tile_sequence_ptr,
    tile_chunk_ptr, dq_ptr, tiles, tokens, scale, grad_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (tile, P heads) walks the key blocks as the forward pass does."""
    tile, unit = tiles - 1 - tl.program_id(0) // (H // P), tl.program_id(0) % (H // P)
    _, chunk, begin, start, end = _place(begins_ptr, lengths_ptr, starts_ptr, tile_sequence_ptr, tile_chunk_ptr, tile)
    x = tl.arange(0, P * C)
    first, at, row, valid = _query_rows(x, begin, start, end, chunk, unit, H, K, C, P, False)
    q = _load_rows(q_ptr + first * D, at * D, valid, D, BLOCK_D, OPERAND)
    grad = _load_rows(grad_ptr + first * D, at * D, valid, D, BLOCK_D, OPERAND)
    stats = (unit * P).to(tl.int64) * tokens + begin - start + chunk * C
    stats_at = x // C * tokens + row
    log_sum = tl.load(log_sum_ptr + stats + stats_at, mask=valid, other=0.0)[:, None]
    delta = tl.load(delta_ptr + stats + stats_at, mask=valid, other=0.0)[:, None]
    key, kv_head = tl.arange(0, C), unit * P // (H // K)
    dq = tl.zeros([P * C, BLOCK_D], tl.float32)
    for block in range(chunk + 1):
        place, known = ((begin + block * C).to(tl.int64) * K + kv_head) * D, block * C + key < end
        k = _load_rows(k_ptr + place, key * (K * D), known, D, BLOCK_D, OPERAND)
        v = _load_rows(v_ptr + place, key * (K * D), known, D, BLOCK_D, OPERAND)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if block == chunk:
            scores = tl.where(key[None, :] <= row[:, None], scores, float("-inf"))
        weights = tl.exp2(tl.fma(scores, scale, -log_sum))
        score_grad = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta)
        dq = tl.dot(score_grad.to(OPERAND), k, dq, input_precision="ieee")
    _store_rows(dq_ptr + first * D, at * D, dq * grad_scale, valid, D, BLOCK_D)


@jit("tokens")
def _key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, log_sum_ptr, delta_ptr, begins_ptr, lengths_ptr, starts_ptr, tile_sequence_ptr,
    tile_chunk_ptr, dk_ptr, dv_ptr, tokens, scale, grad_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (tile, key-value head) takes P key blocks if the tile is their first, and walks the queries that see
    them: Q positions at a time in ascending order, of each the heads in ascending order."""
    tile, kv_head = tl.program_id(0) // K, tl.program_id(0) % K
    _, chunk, begin, _, length = _place(begins_ptr, lengths_ptr, starts_ptr, tile_sequence_ptr, tile_chunk_ptr, tile)
    if chunk % P != 0:
        return
    key, query = tl.arange(0, P * C), tl.arange(0, Q)
    place, known = ((begin + chunk * C).to(tl.int64) * K + kv_head) * D, chunk * C + key < length
    k = _load_rows(k_ptr + place, key * (K * D), known, D, BLOCK_D, OPERAND)
    v = _load_rows(v_ptr + place, key * (K * D), known, D, BLOCK_D, OPERAND)
    dk, dv = tl.zeros([P * C, BLOCK_D], tl.float32), tl.zeros([P * C, BLOCK_D], tl.float32)
    for step in range((tl.cdiv(length - chunk * C, Q)) * (H // K)):
        ahead, head = step // (H // K), kv_head * (H // K) + step % (H // K)
        token, valid = begin + chunk * C + ahead * Q, chunk * C + ahead * Q + query < length
        first, stats = (token.to(tl.int64) * H + head) * D, head.to(tl.int64) * tokens + token
        q = _load_rows(q_ptr + first, query * (H * D), valid, D, BLOCK_D, OPERAND)
        grad = _load_rows(grad_ptr + first, query * (H * D), valid, D, BLOCK_D, OPERAND)
        log_sum = tl.load(log_sum_ptr + stats + query, mask=valid, other=0.0)[None, :]
        delta = tl.load(delta_ptr + stats + query, mask=valid, other=0.0)[None, :]
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        if ahead * Q < P * C:
            scores = tl.where(key[:, None] <= ahead * Q + query[None, :], scores, float("-inf"))
        weights = tl.exp2(tl.fma(scores, scale, -log_sum))
        dv = tl.dot(weights.to(OPERAND), grad, dv, input_precision="ieee")
        score_grad = weights * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta)
        dk = tl.dot(score_grad.to(OPERAND), q, dk, input_precision="ieee")
    _store_rows(dk_ptr + place, key * (K * D), dk * grad_scale, known, D, BLOCK_D)
    _store_rows(dv_ptr + place, key * (K * D), dv, known, D, BLOCK_D)


def _operand(v: Tensor) -> torch.dtype:
    return torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32


def _widths(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> dict[str, Any]:
    """What the kernels are compiled for. Raises ValueError for a chunk too long for a tile."""
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    if chunk > max(ROWS.values()):
        raise ValueError(f"chunk_size {chunk}: attention on a GPU takes 16 to 128; build the policy with one of them")
    shared = math.gcd(heads // kv_heads, max(1, ROWS[_operand(v)] // chunk))
    return {
        "H": heads, "K": kv_heads, "D": dim, "BLOCK_D": max(16, next_power_of_two(dim)), "C": chunk, "P": shared,
        "OPERAND": triton_dtype(_operand(v)),
    }  # fmt: skip


def _effort(v: Tensor, widths: dict[str, Any]) -> dict[str, int]:
    """A warpgroup to 64 rows, and as many key blocks on their way as shared memory holds."""
    few = v.dtype == torch.bfloat16 and widths["P"] * widths["C"] < 128
    block_bytes = widths["C"] * widths["BLOCK_D"] * _operand(v).itemsize
    return {"warps": 4 if few else 8, "stages": 3 if block_bytes <= 16384 else 2}


def _tables(layout: ChunkLayout) -> tuple[Tensor, ...]:
    t = layout.tables
    return t.begins, t.lengths, t.starts, t.tile_sequence, t.tile_chunk


def _exponent_scale(dim: int) -> float:
    """Takes a product of q and k to an exponent of 2."""
    return dim**-0.5 * math.log2(math.e)


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, layout: ChunkLayout) -> tuple[Tensor, tuple[Tensor, ...]]:
    q, k, v = (aligned(x.to(_operand(v))) for x in (q, k, v))
    o, log_sum = like(q, *q.shape), like(q, q.shape[1], len(q))
    widths, tiles, tables = _widths(q, k, v, layout.chunk_size), layout.num_tiles, _tables(layout)
    launch(
        _forward_kernel, (tiles * widths["H"] // widths["P"],), q, k, v, tables[0], *tables, o, log_sum, o, o, tiles,
        len(q), 0, _exponent_scale(q.shape[2]), BLOCKS=SEGMENT // layout.chunk_size, KEPT=0, PAGED=False, DECODE=False,
        SPLIT=False, **widths, **_effort(v, widths),
    )  # fmt: skip
    return o, (q, k, v, o, log_sum)


def _triton_backward(grad: Tensor, saved: tuple[Tensor, ...], layout: ChunkLayout) -> tuple[Tensor, ...]:
    q, k, v, o, log_sum = saved
    widths, tiles, tables = _widths(q, k, v, layout.chunk_size), layout.num_tiles, _tables(layout)
    tokens, heads, dim = q.shape
    operands = {name: widths[name] for name in ("H", "D", "BLOCK_D", "OPERAND")}
    low, delta = like(q, *q.shape, dtype=q.dtype), like(q, heads, tokens)
    rows = tokens * heads
    launch(_delta_kernel, (divide_up(rows, 32),), aligned(grad), o, low, delta, rows, tokens, BLOCK_R=32, **operands)
    inputs, scales = (q, k, v, low, log_sum, delta, *tables), (_exponent_scale(dim), dim**-0.5)
    dq, dk, dv = like(q, *q.shape), like(k, *k.shape), like(v, *v.shape)
    launch(
        _query_gradient_kernel, (tiles * heads // widths["P"],), *inputs, dq, tiles, tokens, *scales, **widths,
        **_effort(v, widths),
    )  # fmt: skip
    # Fewer query rows at a time than keys: both gradients of P key blocks stay in registers.
    widths |= {"P": max(1, ROWS[v.dtype] // layout.chunk_size), "Q": min(layout.chunk_size, 32)}
    launch(_key_gradient_kernel, (tiles * widths["K"],), *inputs, dk, dv, tokens, *scales, **widths, warps=8, stages=3)
    return dq, dk, dv


def _triton_cached(q: Tensor, k: Tensor, v: Tensor, layout: ChunkLayout, cache: PagedCache) -> Tensor:
    assert cache.key.is_contiguous() and cache.value.is_contiguous(), "pools are written in place"
    table = aligned(torch.as_tensor(cache.block_table, device=q.device))
    widths, tables, blocks = _widths(q, k, v, layout.chunk_size), _tables(layout), SEGMENT // layout.chunk_size
    effort = _effort(v, widths)
    effort["stages"] = 2 * effort["stages"] - 1  # a block is loaded a stage after its number
    append = {name: widths[name] for name in ("K", "D", "BLOCK_D", "C")}
    pools, grid = (cache.key, cache.value, table), (layout.num_tiles, widths["K"])
    launch(_append_kernel, grid, aligned(k), aligned(v), *pools, *tables, table.shape[1], **append)
    q, group, rows = aligned(q.to(_operand(v))), widths["H"] // widths["K"], widths["P"] * widths["C"]
    decode = layout.is_decode and group <= rows
    widths |= {"DECODE": decode, "KEPT": group if decode else rows, "BLOCKS": blocks}
    units = layout.num_tiles * (widths["K"] if decode else widths["H"] // widths["P"])
    segments = int(layout.tile_chunk.max()) // blocks + 1
    split = segments > 1 and units < (_DECODE_PROGRAMS if decode else _TILE_PROGRAMS)
    o, stored = like(q, *q.shape), segments if split else 0
    parts = like(q, stored, units, widths["KEPT"], q.shape[2]), like(q, stored, 2, units, widths["KEPT"])
    launch(
        _forward_kernel, (units, max(1, stored)), q, *pools, *tables, o, o, *parts, layout.num_tiles, len(q),
        table.shape[1], _exponent_scale(q.shape[2]), PAGED=True, SPLIT=split, **widths, **effort,
    )  # fmt: skip
    if split:
        del widths["OPERAND"]
        grid = (units, divide_up(widths["KEPT"], _MERGE_ROWS))
        launch(_merge_kernel, grid, *parts, *tables, o, layout.num_tiles, BLOCK_R=_MERGE_ROWS, **widths)
    return o


# The fast form: torch's own attention, whose sums follow the batch.


def _write_new_keys(k: Tensor, v: Tensor, layout: ChunkLayout, cache: PagedCache) -> None:
    table = torch.as_tensor(cache.block_table, device=k.device)
    block, row = layout.position_ids // layout.chunk_size, layout.position_ids % layout.chunk_size
    places = table[torch.from_numpy(layout.token_sequence).to(k.device), block]
    cache.value[places, :, row] = v.to(cache.value.dtype)
    if k.is_cuda:
        cache.key[places, :, row] = k.to(cache.key.dtype)
    else:
        width = panels_of(cache.key).shape[-1]
        panels_of(cache.key)[places, :, row // width, :, row % width] = k.to(cache.key.dtype)


def _blocks_of(cache: PagedCache, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [*pages, K, C, d]."""
    keys, values = cache.key[pages], cache.value[pages]
    return keys if keys.is_cuda else panels_of(keys).transpose(-1, -2).reshape(keys.shape), values


def _fast(q: Tensor, k: Tensor, v: Tensor, layout: ChunkLayout, cache: PagedCache | None) -> Tensor:
    q, k = q.to(v.dtype), k.to(v.dtype)
    if cache is not None:
        _write_new_keys(k, v, layout, cache)
        return (_fast_decode if layout.is_decode else _fast_prefill)(q, layout, cache).float()
    parts = (x.transpose(0, 1)[None].split(layout.lengths.tolist(), dim=2) for x in (q, k, v))
    attend = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    return torch.cat([attend(*part) for part in zip(*parts, strict=True)], dim=2)[0].transpose(0, 1).float()


def _fast_decode(q: Tensor, layout: ChunkLayout, cache: PagedCache) -> Tensor:
    """All sequences at once, padded to the longest; the heads of a group are rows of one matrix."""
    pages = torch.as_tensor(cache.block_table, device=q.device)[:, : int(layout.tile_chunk.max()) + 1]
    keys, values = (blocks.transpose(1, 2).flatten(2, 3).to(q.dtype) for blocks in _blocks_of(cache, pages))
    seen = torch.arange(keys.shape[2], device=q.device) <= layout.position_ids[:, None]
    groups = q.unflatten(1, (keys.shape[1], -1))
    return F.scaled_dot_product_attention(groups, keys, values, attn_mask=seen[:, None, None]).flatten(1, 2)


def _fast_prefill(q: Tensor, layout: ChunkLayout, cache: PagedCache) -> Tensor:
    table, outputs = torch.as_tensor(cache.block_table, device=q.device), []
    positions = layout.position_ids.split(layout.lengths.tolist())
    for s, queries in enumerate(q.split(layout.lengths.tolist())):
        end = int(layout.starts[s] + layout.lengths[s])
        pages = table[s, : -(-end // layout.chunk_size)]
        keys, values = (blocks.transpose(0, 1).flatten(1, 2).to(q.dtype) for blocks in _blocks_of(cache, pages))
        seen = torch.arange(keys.shape[1], device=q.device) <= positions[s][:, None]
        queries, keys, values = queries.transpose(0, 1)[None], keys[None], values[None]
        outputs.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, enable_gqa=True)[0])
    return torch.cat(outputs, dim=1).transpose(0, 1)


class _SoftmaxAttention(torch.autograd.Function):
    """Packed sequences from position 0."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: ChunkLayout, path: Path) -> Tensor:
        o, saved = (_triton_forward if path is Path.TRITON else _cpu_forward)(q, k, v, layout)
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.path, ctx.dtypes = layout, path, (q.dtype, k.dtype, v.dtype)
        return o

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = _triton_backward if ctx.path is Path.TRITON else _cpu_backward
        grads = backward(grad, ctx.saved_tensors, ctx.layout)
        return *(x.to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)), None, None


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, layout: ChunkLayout, cache: PagedCache | None = None) -> Tensor:
    """q [T, H, d], k, v [T, K, d] -> FP32 [T, H, d]. With a cache there is no gradient; its blocks take new keys."""
    path = choose("softmax_attention", q)
    if path is Path.FAST:
        return _fast(q, k, v, layout, cache)
    if cache is not None:
        if path is Path.TRITON:
            return _triton_cached(q, k, v, layout, cache)
        return _cpu_attend(q, k, v, layout, cache)[0]
    o: Tensor = apply(_SoftmaxAttention, q, k, v, layout, path)
    return o
