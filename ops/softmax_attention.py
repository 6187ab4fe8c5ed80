"""Causal softmax attention with grouped query heads, over key blocks counted from position 0 (design A4).

    o_i = sum_{j <= i} softmax_j(d^-1/2 q_i k_j) v_j        query head h reads key-value head h // (H / K)

q [T, H, d], k, v [T, K, d] -> o FP32 [T, H, d]. Keys lie in blocks of C positions, which are also the query tiles.
Every (query tile, key block) pair is one product of one shape; the row maximum is exact whatever the order; sums run
inside a block first and then over blocks in ascending order, and a block that a row must not see adds exact zeros. So a
row's bits depend on its own sequence alone, and one query row (decode) equals the same row of a full tile (training).

Letters: T tokens, N tiles, P pairs, H heads, K key-value heads, G = H / K, C block length, d head dimension, R query
rows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ops.layout import ChunkLayout
from ops.linear import BMM_MIN_ROWS, bmm

MAX_SCORES = 1 << 24  # scores held at once (64 MiB); query tiles are taken in groups under it, which moves no bit


@dataclass(frozen=True)
class PagedCache:
    """One layer's key and value blocks, and the blocks of each sequence of the batch in order of position."""

    key: Tensor  # FP32 [blocks, K, C, d]
    value: Tensor  # FP32 [blocks, K, C, d]
    block_table: np.ndarray  # int64 [S, >= blocks needed]


@dataclass(frozen=True)
class _Pairs:
    """Pairs in order of key block, so that those of one key block are a slice over a prefix of the query tiles."""

    query_tiles: Tensor  # [N] tile numbers, those with most key blocks first
    counts: tuple[int, ...]  # query tiles that see key block 0, 1, ...
    query: Tensor  # [P] position in query_tiles
    key: Tensor  # [P] key block number in the pool


def softmax_attention_reference(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Dense attention, sequence by sequence, in the dtype of q."""
    groups, outputs = q.shape[1] // k.shape[1], []
    for qs, ks, vs in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        ks, vs = (x.repeat_interleave(groups, dim=1) for x in (ks, vs))
        scores = torch.einsum("ihd,jhd->hij", qs, ks) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(len(qs), len(qs)).triu(1).bool(), float("-inf"))
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), vs))
    return torch.cat(outputs)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, layout: ChunkLayout, cache: PagedCache | None = None) -> Tensor:
    """q [T, H, d], k, v [T, K, d] -> FP32 [T, H, d]. With a cache there is no gradient; its blocks take new keys."""
    q, k, v = q.float() * q.shape[-1] ** -0.5, k.float(), v.float()
    if cache is None:
        o: Tensor = _Softmax.apply(q, k, v, layout)
        return o
    token_tile = layout.token_slot.numpy() // layout.chunk_size
    blocks = torch.from_numpy(cache.block_table[layout.tile_sequence, layout.tile_chunk][token_tile])
    cache.key[blocks, :, layout.token_row] = k
    cache.value[blocks, :, layout.token_row] = v
    pieces = _query_groups(layout, cache.block_table, k.shape[1], q.shape[1] // k.shape[1])
    if not layout.is_decode:
        tiles = layout.into_tiles(q)
        out = torch.empty_like(tiles)
        rows = torch.arange(layout.chunk_size)[None, :, None]
        for pairs in pieces:
            out[pairs.query_tiles] = _forward(tiles, cache.key, cache.value, rows, pairs, layout)[0]
        return layout.from_tiles(out)
    copies = -(-BMM_MIN_ROWS // (q.shape[1] // k.shape[1]))
    tiles = q[:, :, None].expand(-1, -1, copies, -1).contiguous()
    out = torch.empty_like(q)
    for pairs in pieces:
        rows = layout.token_row[pairs.query_tiles][:, None, None]
        out[pairs.query_tiles] = _forward(tiles, cache.key, cache.value, rows, pairs, layout)[0][:, :, 0]
    return out


def _query_groups(layout: ChunkLayout, block_table: np.ndarray, kv_heads: int, groups: int) -> list[_Pairs]:
    """Pairs of all query tiles, cut into pieces whose scores fit MAX_SCORES."""
    order = np.argsort(-layout.tile_chunk, kind="stable")
    rows = BMM_MIN_ROWS if layout.is_decode else layout.chunk_size * groups
    room = max(1, MAX_SCORES // (kv_heads * rows * layout.chunk_size))
    # The first tile sees the most key blocks, so it bounds what a piece of tiles needs.
    pieces, begin = [], 0
    while begin < len(order):
        size = max(1, room // int(layout.tile_chunk[order[begin]] + 1))
        pieces.append(_pairs(order[begin : begin + size], layout, block_table))
        begin += size
    return pieces


def _pairs(order: np.ndarray, layout: ChunkLayout, block_table: np.ndarray) -> _Pairs:
    chunks = layout.tile_chunk[order]
    counts = (chunks[None] >= np.arange(chunks[0] + 1)[:, None]).sum(1)
    query = np.concatenate([np.arange(count) for count in counts])
    key_index = np.repeat(np.arange(len(counts)), counts)
    key = block_table[layout.tile_sequence[order[query]], key_index]
    return _Pairs(torch.from_numpy(order), tuple(counts.tolist()), torch.from_numpy(query), torch.from_numpy(key))


def _forward(
    tiles: Tensor, keys: Tensor, values: Tensor, rows: Tensor, pairs: _Pairs, layout: ChunkLayout
) -> tuple[Tensor, Tensor]:
    """tiles [N, H, R, d], rows broadcastable to [tiles, R, 1] -> outputs [tiles of pairs, H, R, d] and
    log-sum-exp [tiles of pairs, H, R]."""
    heads, num_rows, dim = tiles.shape[1:]
    kv_heads, chunk = keys.shape[1:3]
    q = tiles.index_select(0, pairs.query_tiles).view(-1, kv_heads, heads // kv_heads * num_rows, dim)
    scores = bmm(q.index_select(0, pairs.query), keys.index_select(0, pairs.key).transpose(2, 3))  # [P, K, G * R, C]
    scores = scores.unflatten(2, (heads // kv_heads, num_rows))
    _mask_own_tile(scores, rows, pairs, chunk)
    top = _fold(scores.amax(-1), pairs, torch.maximum)
    weights = scores.sub_(top.index_select(0, pairs.query).unsqueeze(-1)).exp_()
    total = _fold(weights.sum(-1), pairs, torch.add)
    out = _fold(bmm(weights.flatten(2, 3), values.index_select(0, pairs.key)), pairs, torch.add)
    out = out.view(-1, heads, num_rows, dim).div_(total.view(-1, heads, num_rows, 1))
    return out, (top + total.log()).view(-1, heads, num_rows)


def _mask_own_tile(scores: Tensor, rows: Tensor, pairs: _Pairs, chunk: int) -> None:
    """Keys after the query: only a tile's last key block, its own, holds any."""
    counts = np.asarray(pairs.counts)
    tiles = len(pairs.query_tiles)
    last = (counts[:, None] > np.arange(tiles)).sum(0) - 1  # key block index of each tile's own block
    own = torch.from_numpy((np.cumsum(counts) - counts)[last] + np.arange(tiles))
    future = torch.arange(chunk) > rows  # [tiles or 1, R, C]
    scores.index_copy_(0, own, scores.index_select(0, own).masked_fill_(future[:, None, None], float("-inf")))


def _fold(parts: Tensor, pairs: _Pairs, combine: Any) -> Tensor:
    """Merges the key blocks of each query tile in ascending order: [P, ...] -> [tiles, ...]."""
    first, result = pairs.counts[0], parts[: pairs.counts[0]].clone()
    for count in pairs.counts[1:]:
        combine(result[:count], parts[first : first + count], out=result[:count])
        first += count
    return result


class _Softmax(torch.autograd.Function):
    """Packed sequences from position 0; the sequence's own tiles are its key blocks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: ChunkLayout) -> Tensor:
        tiles, keys, values = (layout.into_tiles(x) for x in (q, k, v))
        out = torch.empty_like(tiles)
        log_sum = tiles.new_empty(tiles.shape[:3])
        rows = torch.arange(layout.chunk_size)[None, :, None]
        for pairs in _query_groups(layout, layout.sequence_tiles, k.shape[1], q.shape[1] // k.shape[1]):
            out[pairs.query_tiles], log_sum[pairs.query_tiles] = _forward(tiles, keys, values, rows, pairs, layout)
        ctx.save_for_backward(tiles, keys, values, out, log_sum)
        ctx.layout = layout
        return layout.from_tiles(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, log_sum = ctx.saved_tensors
        layout: ChunkLayout = ctx.layout
        grad = layout.into_tiles(grad)
        mean = (grad * out).sum(-1, keepdim=True)
        grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for distance in range(len(layout.ranks)):
            _backward_at_distance(distance, q, k, v, grad, mean, log_sum, grads, layout)
        return layout.from_tiles(grads[0]), layout.from_tiles(grads[1]), layout.from_tiles(grads[2]), None


def _backward_at_distance(
    distance: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    mean: Tensor,
    log_sum: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    layout: ChunkLayout,
) -> None:
    """Adds what query tiles contribute with the key block `distance` tiles before them: one pair per
    tile, so no sum races."""
    table = layout.sequence_tiles
    query = torch.from_numpy(table[:, distance:][table[:, distance:] >= 0])
    key = torch.from_numpy(table[:, : table.shape[1] - distance][table[:, distance:] >= 0])
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]

    def by_kv_head(x: Tensor) -> Tensor:
        return x.index_select(0, query).unflatten(1, (kv_heads, groups)).flatten(2, 3)  # [P, K, G * C, ...]

    queries, grad_out, keys = by_kv_head(q), by_kv_head(grad), k.index_select(0, key)
    weights = bmm(queries, keys.transpose(2, 3)).sub_(by_kv_head(log_sum.unsqueeze(-1))).exp_()
    if distance == 0:
        weights.unflatten(2, (groups, -1)).tril_()
    grads[2].index_add_(0, key, bmm(weights.transpose(2, 3), grad_out))
    grad_scores = bmm(grad_out, v.index_select(0, key).transpose(2, 3)).sub_(by_kv_head(mean)).mul_(weights)
    grads[1].index_add_(0, key, bmm(grad_scores.transpose(2, 3), queries))
    grads[0].index_add_(0, query, bmm(grad_scores, keys).view(-1, *q.shape[1:]))
