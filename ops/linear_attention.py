"""Lightning attention, chunk-anchored: causal linear attention with one fixed decay per head (report 2.2.2, Eq. 1-4).

    S_t = lambda S_{t-1} + k_t^T v_t        o_t = d^-1/2 q_t S_t        lambda = exp(-slope), S_0 = 0

q, k, v [T, H, d] -> o FP32 [T, H, d]. The recurrence above is only the reference. The operator works on chunk tiles of
C positions counted from position 0 of the sequence, in training, prefill and decode alike (design A3): with S the state
at the tile's first position and i, j rows of the tile,

    o_i = sum_{j <= i} lambda^(i-j) (q_i k_j) v_j + lambda^(i+1) q_i S
    S'  = lambda^C S + sum_j lambda^(C-1-j) k_j^T v_j

A decode step has one query row but the same keys, values and state as the training tile, and a matrix product's row has
the same bits alone (in a tile of BMM_MIN_ROWS) or among others, so decode = prefill = training in bits. The state is
FP32, read at every step and written once per chunk; the K and V of the open chunk wait in the cache.

Letters: T tokens, N tiles, S sequences, H heads, C chunk length, d head dimension, R query rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops.layout import ChunkLayout
from ops.linear import BMM_MIN_ROWS, bmm


@dataclass(frozen=True)
class DecayTables:
    """Powers of lambda for one layer, FP32, each rounded once from FP64."""

    tile: Tensor  # [H, C, C] lambda^(i-j), zero above the diagonal
    query: Tensor  # [H, C, 1] lambda^(i+1)
    key: Tensor  # [H, C, 1] lambda^(C-1-j)
    chunk: Tensor  # [H, 1, 1] lambda^C

    @classmethod
    def build(cls, slopes: Tensor, chunk_size: int) -> "DecayTables":
        """slopes [H], positive: lambda_h = exp(-slopes[h])."""
        rows = torch.arange(chunk_size, dtype=torch.float64)
        log_decay = -slopes.double()[:, None, None]
        distance = rows[:, None] - rows
        tile = torch.exp(log_decay * distance.clamp(min=0)) * (distance >= 0)
        query, key = torch.exp(log_decay * (rows[:, None] + 1)), torch.exp(log_decay * (chunk_size - 1 - rows[:, None]))
        return cls(tile.float(), query.float(), key.float(), torch.exp(log_decay * chunk_size).float())


@dataclass(frozen=True)
class LightningCache:
    """One layer's pools, and which slot each sequence of the batch owns. The operator updates the pools in place."""

    state: Tensor  # FP32 [slots, H, d, d], at the last chunk boundary
    key: Tensor  # FP32 [slots, H, C, d], keys of the open chunk
    value: Tensor  # FP32 [slots, H, C, d]
    slots: Tensor  # int64 [S]


def lightning_attention_reference(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, lengths: list[int]) -> Tensor:
    """The recurrence, token by token, in the dtype of q."""
    outputs, begin = [], 0
    decay = torch.exp(-slopes.to(q.dtype))[:, None, None]
    for length in lengths:
        state = q.new_zeros(q.shape[1], q.shape[2], v.shape[2])
        for t in range(begin, begin + length):
            state = decay * state + k[t, :, :, None] * v[t, :, None, :]
            outputs.append((q[t, :, None, :] @ state).squeeze(1) * q.shape[2] ** -0.5)
        begin += length
    return torch.stack(outputs)


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: DecayTables, layout: ChunkLayout, cache: LightningCache | None = None
) -> Tensor:
    """q, k, v [T, H, d] -> FP32 [T, H, d]. With a cache there is no gradient, and the pools take in the new tokens."""
    q, k, v = q.float() * q.shape[-1] ** -0.5, k.float(), v.float()
    if cache is not None:
        return _cached(q, k, v, decay, layout, cache)
    o: Tensor = _Lightning.apply(q, k, v, decay, layout)
    return o


def _cached(q: Tensor, k: Tensor, v: Tensor, decay: DecayTables, layout: ChunkLayout, cache: LightningCache) -> Tensor:
    order = layout.sequence_order
    slots = cache.slots[order]
    keys, values = (_tiles_with_open_chunk(x, pool, layout, slots) for x, pool in ((k, cache.key), (v, cache.value)))
    state = _take(cache.state, slots)
    previous, advanced = _scan(keys, values, state, decay, layout)
    if layout.is_decode:
        row = layout.token_row
        tile_decay = decay.tile[:, row].transpose(0, 1).unsqueeze(2)  # [N, H, 1, C]
        query_decay = decay.query[:, row].transpose(0, 1).unsqueeze(2)  # [N, H, 1, 1]
        rows = q[:, :, None].expand(-1, -1, BMM_MIN_ROWS, -1).contiguous()
        o = _tile_output(rows, keys, values, previous, tile_decay, query_decay)[:, :, 0].contiguous()
    else:
        o = layout.from_tiles(_tile_output(layout.into_tiles(q), keys, values, previous, decay.tile, decay.query))
    cache.state[slots[layout.complete[0]]] = advanced  # last, because `previous` may be a view of the pool
    return o


def _take(pool: Tensor, slots: Tensor) -> Tensor:
    """The slots' part of a pool: a view where they are consecutive, which saves the copy that would cost most of a
    decode step."""
    first, count = int(slots[0]), len(slots)
    if torch.equal(slots, torch.arange(first, first + count)):
        return pool[first : first + count]
    return pool.index_select(0, slots)


def _tiles_with_open_chunk(x: Tensor, pool: Tensor, layout: ChunkLayout, slots: Tensor) -> Tensor:
    """Tiles [N, H, C, d] of the new tokens, the first of each sequence completed by its open chunk. The pool keeps
    the last."""
    if layout.is_decode:
        pool[slots, :, layout.token_row] = x
        return _take(pool, slots)
    tiles = layout.into_tiles(x)
    continued = torch.from_numpy((layout.starts % layout.chunk_size)[layout.sequence_order.numpy()])
    first = tiles[: len(slots)]
    is_old = torch.arange(layout.chunk_size) < continued[:, None]
    tiles[: len(slots)] = torch.where(is_old[:, None, :, None], pool.index_select(0, slots), first)
    last = torch.from_numpy(layout.sequence_tiles.max(1))[layout.sequence_order]
    pool[slots] = tiles.index_select(0, last)
    return tiles


def _scan(
    keys: Tensor, values: Tensor, state: Tensor, decay: DecayTables, layout: ChunkLayout
) -> tuple[Tensor, Tensor]:
    """From `state` [S, H, d, d] in scan order: the state before each tile [N, H, d, d], and the final state of those
    sequences (layout.complete[0]) that filled a chunk."""

    def advance(rank: int) -> Tensor:
        full = layout.complete[rank]
        tiles = full + layout.ranks[rank][0]
        new_keys, new_values = keys.index_select(0, tiles), values.index_select(0, tiles)
        update = bmm(new_keys.mul_(decay.key).transpose(2, 3), new_values)
        return state.index_select(0, full).mul_(decay.chunk).add_(update)

    if len(layout.ranks) == 1:
        return state, advance(0)
    previous, state = state.new_empty(keys.shape[0], *state.shape[1:]), state.clone()
    for rank, (first, count) in enumerate(layout.ranks):
        previous[first : first + count] = state[:count]
        state[layout.complete[rank]] = advance(rank)
    return previous, state[layout.complete[0]]


def _tile_output(
    q: Tensor, keys: Tensor, values: Tensor, previous: Tensor, tile_decay: Tensor, query_decay: Tensor
) -> Tensor:
    """q [N, H, R, d], keys and values [N, H, C, d], previous [N, H, d, d] -> [N, H, R, d]."""
    scores = bmm(q, keys.transpose(2, 3)).mul_(tile_decay)
    return bmm(scores, values).add_(bmm(q, previous).mul_(query_decay))


class _Lightning(torch.autograd.Function):
    """Packed sequences from position 0. Backward keeps the states before each tile and recomputes the scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: DecayTables, layout: ChunkLayout) -> Tensor:
        tiles = layout.into_tiles(q), layout.into_tiles(k), layout.into_tiles(v)
        state = q.new_zeros(len(layout.lengths), q.shape[1], q.shape[2], v.shape[2])
        previous, _ = _scan(tiles[1], tiles[2], state, decay, layout)
        ctx.save_for_backward(*tiles, previous)
        ctx.decay, ctx.layout = decay, layout
        return layout.from_tiles(_tile_output(*tiles, previous, decay.tile, decay.query))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, previous = ctx.saved_tensors
        decay, layout = ctx.decay, ctx.layout
        grad = layout.into_tiles(grad)
        scores = bmm(q, k.transpose(2, 3)).mul_(decay.tile)
        grad_scores = bmm(grad, v.transpose(2, 3)).mul_(decay.tile)
        grad_state = _scan_backward(q, grad, decay, layout)
        # Row scaling commutes with the product from the right: lambda^(i+1) (dO S^T), lambda^(C-1-j) (V dS^T).
        dq = bmm(grad_scores, k).add_(bmm(grad, previous.transpose(2, 3)).mul_(decay.query))
        dk = bmm(grad_scores.transpose(2, 3), q).add_(bmm(v, grad_state.transpose(2, 3)).mul_(decay.key))
        dv = bmm(scores.transpose(2, 3), grad).add_(bmm(k, grad_state).mul_(decay.key))
        return layout.from_tiles(dq), layout.from_tiles(dk), layout.from_tiles(dv), None, None


def _scan_backward(q: Tensor, grad: Tensor, decay: DecayTables, layout: ChunkLayout) -> Tensor:
    """Gradient of the state after each tile, [N, H, d, d]: from the last rank back to the first."""
    after = q.new_zeros(q.shape[0], q.shape[1], q.shape[3], grad.shape[3])
    through = bmm((q * decay.query).transpose(2, 3), grad)
    for (first, _), (later, count) in zip(reversed(layout.ranks[:-1]), reversed(layout.ranks[1:]), strict=True):
        after[first : first + count] = after[later : later + count] * decay.chunk + through[later : later + count]
    return after
