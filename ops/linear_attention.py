"""Lightning attention, chunk-anchored: causal linear attention with one fixed decay per head (report 2.2.2, Eq. 1-4).

    S_t = lambda S_{t-1} + k_t^T v_t        o_t = d^-1/2 q_t S_t        lambda = exp(-slope), S_0 = 0

q, k, v [T, H, d] -> o FP32 [T, H, d]. The recurrence above is only the reference. The operator works on chunk tiles of
C positions counted from position 0 of the sequence, in training, prefill and decode alike (design A3): with S the state
at the tile's first position and i, j rows of the tile,

    o_i = sum_{j <= i} lambda^(i-j) (q_i k_j) v_j + lambda^(i+1) q_i S
    S'  = lambda^C S + sum_j lambda^(C-1-j) k_j^T v_j

A decode step has one query row but the same keys, values and state as the training tile, and a row of a product has the
same bits alone or among others, so decode = prefill = training in bits. The state is FP32, read at every step and
written once per chunk; the K and V of the open chunk wait in the cache.

The CPU path computes in FP32. The Triton path multiplies BF16 operands where v is BF16, else FP32, and accumulates in
FP32; q k^T lambda^(i-j) and lambda^(C-1-j) v are rounded to the operand type, S is read as a sum of two BF16 terms.

Letters: T tokens, N tiles, S sequences, H heads, C chunk length, d head dimension, R query rows.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ops.autograd import apply
from ops.compiled import (
    ZERO,
    add_weighted,
    compiled,
    f32,
    fma,
    number,
    panels_of,
    plain,
    readable,
    score_keys,
    share,
    stored,
)
from ops.dispatch import Path, choose
from ops.jit import ALIGNMENT, aligned, jit, launch, like, tl, triton_dtype
from ops.layout import ChunkLayout


@dataclass(frozen=True)
class DecayTables:
    """Powers of lambda for one layer, FP32, each rounded once from FP64. They must be where the tokens are."""

    tile: Tensor  # [H, C, C] lambda^(i-j), zero above the diagonal
    query: Tensor  # [H, C, 1] lambda^(i+1)
    key: Tensor  # [H, C, 1] lambda^(C-1-j)
    chunk: Tensor  # [H, 1, 1] lambda^C
    rate: Tensor  # [H] -log2 lambda: kernels compute 2^(-rate n) where they need it, which is cheaper than a load

    @classmethod
    def build(cls, slopes: Tensor, chunk_size: int) -> "DecayTables":
        """slopes [H], positive: lambda_h = exp(-slopes[h])."""
        rows = torch.arange(chunk_size, dtype=torch.float64)
        log_decay = -slopes.double()[:, None, None]
        distance = rows[:, None] - rows
        tile = torch.exp(log_decay * distance.clamp(min=0)) * (distance >= 0)
        query, key = torch.exp(log_decay * (rows[:, None] + 1)), torch.exp(log_decay * (chunk_size - 1 - rows[:, None]))
        chunk, rate = torch.exp(log_decay * chunk_size), slopes.double() / math.log(2.0)
        return cls(tile.float(), query.float(), key.float(), chunk.float(), rate.float())

    def to(self, device: torch.device) -> "DecayTables":
        return DecayTables(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class LightningCache:
    """One layer's pools, and which slot each sequence of the batch owns. The operator updates the pools in place."""

    state: Tensor  # FP32 [slots, H, d, d], at the last chunk boundary
    key: Tensor  # FP32 or operand type [slots, H, C, d], keys of the open chunk
    value: Tensor  # like key
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


# The CPU path: one kernel for training, prefill and decode, which walks the new tokens of a sequence and a head. Every
# sum runs in order: a score over d, an output over the keys up to its own and, apart, over the d rows of the state.


@compiled
def _advance_state(state, keys, values, key_decay, chunk_decay, weights, update):
    """The state [d, d] behind a full chunk."""
    chunk, width = values.shape[0], keys.shape[2]
    for d in range(state.shape[0]):
        for j in range(chunk):
            weights[0, j] = number(keys[j // width, d, j % width]) * key_decay[j, 0]
        update[:] = ZERO
        add_weighted(1, weights, 0, values, chunk, update)
        for e in range(update.shape[1]):
            state[d, e] = fma(state[d, e], chunk_decay, update[0, e])


@compiled
def _cpu_lightning_kernel(
    begin, end, q, k, v, slots, begins, starts, lengths, scale, tile_decay, query_decay, key_decay, chunk_decay,
    state_pool, key_pool, value_pool, sequence_tiles, previous, out
):  # fmt: skip
    """Items are pairs of a sequence and a head. key_pool [slots, H, C / W, d, W] and value_pool [slots, H, C, d] hold
    the open chunk; previous [N, H, d, d] takes the state in front of every tile, if it has room for any."""
    heads, dim = q.shape[1:]
    chunk, width = value_pool.shape[2], key_pool.shape[4]
    query, across, inside = np.empty((1, dim), f32), np.empty((1, dim), f32), np.empty((1, dim), f32)
    scores = np.empty((1, chunk), f32)
    for item in range(begin, end):
        sequence, head = item // heads, item % heads
        slot, start = slots[sequence], starts[sequence]
        state, keys, values = state_pool[slot, head], key_pool[slot, head], value_pool[slot, head]
        following = item + 1 if item + 1 < end else item
        ahead = (slots[following // heads] - slot) * heads + following % heads - head  # in matrices of the pools
        for n in range(lengths[sequence]):
            token, row = begins[sequence] + n, (start + n) % chunk
            if previous.shape[0] > 0 and (row == 0 or n == 0):
                previous[sequence_tiles[sequence, (start + n) // chunk - start // chunk], head] = state
            panel, value, decay = keys[row // width], values[row], tile_decay[head, row]
            for d in range(dim):
                query[0, d] = q[token, head, d] * scale
                panel[d, row % width] = stored(number(k[token, head, d]), key_pool)
            for d in range(dim):
                value[d] = stored(number(v[token, head, d]), value_pool)
            score_keys(1, query, keys, row + 1, scores, 0, ahead * chunk * dim)
            for j in range(row + 1):
                scores[0, j] *= decay[j]
            inside[:] = ZERO
            add_weighted(1, scores, 0, values, row + 1, inside, ahead * chunk * dim)
            across[:] = ZERO
            add_weighted(1, query, 0, state, dim, across, ahead * dim * dim)
            for d in range(dim):
                out[token, head, d] = fma(across[0, d], query_decay[head, row, 0], inside[0, d])
            if row == chunk - 1:
                _advance_state(state, keys, values, key_decay[head], chunk_decay[head, 0, 0], scores, inside)


def _cpu_attend(
    q: Tensor, k: Tensor, v: Tensor, decay: DecayTables, layout: ChunkLayout, cache: LightningCache, previous: Tensor
) -> Tensor:
    """FP32 [T, H, d]; the cache takes in the new tokens."""
    q, k, v = plain(q), readable(k), readable(v)
    (heads, _, dim), chunk = cache.value.shape[1:], layout.chunk_size
    out = torch.empty_like(q)
    share(
        _cpu_lightning_kernel, len(layout.lengths) * heads, 2 * q.numel() * (dim + 2 * chunk), q, k, v, cache.slots,
        layout.begins, layout.starts, layout.lengths, f32(_scale(q)), decay.tile, decay.query, decay.key, decay.chunk,
        cache.state, panels_of(cache.key), cache.value, layout.sequence_tiles, previous, out,
    )  # fmt: skip
    return out


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: DecayTables, layout: ChunkLayout
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and what backward needs: the tokens and the states before their tiles."""
    sequences, (heads, dim), chunk = len(layout.lengths), q.shape[1:], layout.chunk_size
    state, shape = torch.zeros(sequences, heads, dim, dim), (sequences, heads, chunk, dim)
    cache = LightningCache(state, k.new_empty(shape), v.new_empty(shape), torch.arange(sequences))
    previous = torch.empty(layout.num_tiles, heads, dim, dim)
    return _cpu_attend(q, k, v, decay, layout, cache, previous), (q, k, v, previous)


def _cpu_backward(
    saved: tuple[Tensor, ...], grad: Tensor, decay: DecayTables, layout: ChunkLayout
) -> tuple[Tensor, Tensor, Tensor]:
    *tokens, previous = saved
    q, k, v, grad = (layout.into_tiles(x) for x in (*_scaled(*tokens), grad))
    scores = (q @ k.transpose(2, 3)).mul_(decay.tile)
    grad_scores = (grad @ v.transpose(2, 3)).mul_(decay.tile)
    grad_state = _scan_backward(q, grad, decay, layout)
    # Row scaling commutes with the product from the right: lambda^(i+1) (dO S^T), lambda^(C-1-j) (V dS^T).
    dq = (grad_scores @ k).add_((grad @ previous.transpose(2, 3)).mul_(decay.query))
    dk = (grad_scores.transpose(2, 3) @ q).add_((v @ grad_state.transpose(2, 3)).mul_(decay.key))
    dv = (scores.transpose(2, 3) @ grad).add_((k @ grad_state).mul_(decay.key))
    return layout.from_tiles(dq).mul_(_scale(q)), layout.from_tiles(dk), layout.from_tiles(dv)


def _scale(q: Tensor) -> float:
    scale: float = q.shape[-1] ** -0.5
    return scale


def _scaled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.float() * _scale(q), k.float(), v.float()


def _scan_backward(q: Tensor, grad: Tensor, decay: DecayTables, layout: ChunkLayout) -> Tensor:
    """Gradient of the state after each tile, [N, H, d, d]: from the last rank back to the first."""
    after = q.new_zeros(q.shape[0], q.shape[1], q.shape[3], grad.shape[3])
    through = (q * decay.query).transpose(2, 3) @ grad
    for (first, _), (later, count) in zip(reversed(layout.ranks[:-1]), reversed(layout.ranks[1:]), strict=True):
        after[first : first + count] = after[later : later + count] * decay.chunk + through[later : later + count]
    return after


# The Triton path. A program works on one tile of C rows and BLOCK columns of one head. Products are arranged such that
# both operands can lie in shared memory: in registers, some compilers overwrite them too early (Triton 3.6 on Hopper).


@jit()
def _span(begins_ptr, lengths_ptr, starts_ptr, sequence):
    return tl.load(begins_ptr + sequence), tl.load(lengths_ptr + sequence), tl.load(starts_ptr + sequence)


@jit()
def _power(rate, distance):
    """lambda^distance."""
    return tl.exp2(-rate * distance.to(tl.float32))


@jit()
def _load_rows(
    x_ptr, pool_ptr, slot, begin, length, local, head, column,
    STRIDE: tl.constexpr, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, CACHED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Columns of a tile [C, ...]: row i is the sequence's new token number local[i]; before those lies the open chunk
    of the pool, behind them nothing, which reads as zero."""
    inside = (local >= 0) & (local < length)
    row = x_ptr + (begin + local).to(tl.int64) * STRIDE + head * D
    if CACHED:
        inside = local < length
        row = tl.where(local < 0, pool_ptr + ((slot * H + head) * C + tl.arange(0, C)) * D, row)
        row = tl.multiple_of(row, 16)  # else Triton 3.9 reads the values one by one
    return tl.load(row[:, None] + column[None, :], mask=inside[:, None], other=0.0).to(DTYPE)


@jit()
def _advance(state, key, value, rate, C: tl.constexpr, REVERSE: tl.constexpr):
    """The state behind a tile: state FP32 [BLOCK, BLOCK], key and value [C, BLOCK]. In reverse, in front of it."""
    row = tl.arange(0, C)
    remaining = row + 1 if REVERSE else C - 1 - row
    weighted = (value.to(tl.float32) * _power(rate, remaining)[:, None]).to(value.dtype)
    return tl.dot(tl.trans(key), weighted, state * tl.exp2(-rate * C), input_precision="ieee")


@jit()
def _attend(query, key, value, high, low, rate, C: tl.constexpr, TERMS: tl.constexpr, REVERSE: tl.constexpr):
    """query and key [C, D], value [C, BLOCK], state [D, BLOCK] = high, or high + low -> FP32 [C, BLOCK]."""
    row = tl.arange(0, C)
    distance = row[:, None] - row[None, :] if REVERSE else row[None, :] - row[:, None]
    weight = tl.dot(key, tl.trans(query), input_precision="ieee") * _power(rate, tl.maximum(distance, 0))
    weight = tl.where(distance >= 0, weight, 0.0).to(value.dtype)  # of key row j for query row i, at [j, i]
    if TERMS == 2:
        across = tl.dot(query, high, tl.dot(query, low, input_precision="ieee"), input_precision="ieee")
    else:
        across = tl.dot(query, high, input_precision="ieee")
    across = across * _power(rate, C - 1 - row if REVERSE else row + 1)[:, None]
    return tl.trans(tl.dot(tl.trans(value), weight, input_precision="ieee")) + across


@jit()
def _store_state(states_ptr, tile, head, at, state, H: tl.constexpr, D: tl.constexpr, TERMS: tl.constexpr):
    dtype: tl.constexpr = states_ptr.dtype.element_ty
    to = states_ptr + (tile.to(tl.int64) * H + head) * TERMS * D * D + at
    high = state.to(dtype)
    tl.store(to, high)
    if TERMS == 2:
        tl.store(to + D * D, (state - high.to(tl.float32)).to(dtype))


@jit("ranks")
def _scan_kernel(
    key_ptr, value_ptr, states_ptr, rate_ptr, state_pool, key_pool, value_pool, slots_ptr,
    begins_ptr, lengths_ptr, starts_ptr, tiles_ptr, ranks,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr, REVERSE: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    """Walks the tiles of one sequence with BLOCK x BLOCK of its state, and keeps the state in front of each. In reverse
    it comes from the last tile and keeps what is behind each."""
    BLOCKS: tl.constexpr = D // BLOCK
    sequence, head = tl.program_id(0) // (BLOCKS * BLOCKS), tl.program_id(1)
    key_column = tl.program_id(0) // BLOCKS % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    value_column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    at = key_column[:, None] * D + value_column[None, :]
    begin, length, start = _span(begins_ptr, lengths_ptr, starts_ptr, sequence)
    rate, slot = tl.load(rate_ptr + head), tl.zeros([], dtype=tl.int64)
    first, last = start // C, (start + length - 1) // C
    state, advances = tl.zeros([BLOCK, BLOCK], dtype=tl.float32), last - first
    if CACHED:
        slot = tl.load(slots_ptr + sequence)
        pool = state_pool + (slot * H + head) * D * D + at
        state, advances = tl.load(pool), (start + length) // C - first
    for step in range(advances):
        rank = last - first - step if REVERSE else step
        _store_state(states_ptr, tl.load(tiles_ptr + sequence * ranks + rank), head, at, state, H, D, TERMS)
        local = (first + rank) * C - start + tl.arange(0, C)
        key = _load_rows(
            key_ptr, key_pool, slot, begin, length, local, head, key_column, KEY_STRIDE, H, D, C, CACHED, DTYPE
        )
        value = _load_rows(
            value_ptr, value_pool, slot, begin, length, local, head, value_column, VALUE_STRIDE, H, D, C, CACHED, DTYPE
        )
        state = _advance(state, key, value, rate, C, REVERSE)
    if advances <= last - first:
        rank = 0 if REVERSE else last - first
        _store_state(states_ptr, tl.load(tiles_ptr + sequence * ranks + rank), head, at, state, H, D, TERMS)
    if CACHED:
        tl.store(pool, state)


@jit()
def _tile_kernel(
    query_ptr, key_ptr, value_ptr, states_ptr, out_ptr, rate_ptr, scale, key_pool, value_pool, slots_ptr,
    begins_ptr, lengths_ptr, starts_ptr, sequences_ptr, chunks_ptr,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr,
    REVERSE: tl.constexpr, CACHED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of the output of one tile; TURNED reads the states as their transposes."""
    BLOCKS: tl.constexpr = D // BLOCK
    tile, head = tl.program_id(0) // BLOCKS, tl.program_id(1)
    column, every = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    sequence = tl.load(sequences_ptr + tile)
    begin, length, start = _span(begins_ptr, lengths_ptr, starts_ptr, sequence)
    local = tl.load(chunks_ptr + tile) * C - start + tl.arange(0, C)
    slot = tl.load(slots_ptr + sequence).to(tl.int64) if CACHED else tl.zeros([], dtype=tl.int64)
    query = _load_rows(
        query_ptr, key_pool, slot, begin, length, local, head, every, QUERY_STRIDE, H, D, C, False, DTYPE
    )
    key = _load_rows(key_ptr, key_pool, slot, begin, length, local, head, every, KEY_STRIDE, H, D, C, CACHED, DTYPE)
    value = _load_rows(
        value_ptr, value_pool, slot, begin, length, local, head, column, VALUE_STRIDE, H, D, C, CACHED, DTYPE
    )
    at = column[None, :] * D + every[:, None] if TURNED else every[:, None] * D + column[None, :]
    state = states_ptr + (tile.to(tl.int64) * H + head) * TERMS * D * D + at
    high = tl.load(state)
    low = tl.load(state + D * D) if TERMS == 2 else high
    out = _attend(query, key, value, high, low, tl.load(rate_ptr + head), C, TERMS, REVERSE) * scale
    at = ((begin + local).to(tl.int64) * H + head)[:, None] * D + column[None, :]
    tl.store(out_ptr + at, out, mask=((local >= 0) & (local < length))[:, None])


@jit()
def _decode_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, rate_ptr, scale, state_pool, key_pool, value_pool, slots_ptr, starts_ptr,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of the output of a sequence's one new token, which then joins the open chunk. Programs of one head
    share its keys: the first writes the new one, and none reads that from the pool."""
    BLOCKS: tl.constexpr = D // BLOCK
    sequence, head = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(1)
    column, every = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    slot, rate = tl.load(slots_ptr + sequence), tl.load(rate_ptr + head)
    row = tl.load(starts_ptr + sequence) % C
    local = tl.arange(0, C) - row
    query = _load_rows(query_ptr, key_pool, slot, sequence, 1, local, head, every, QUERY_STRIDE, H, D, C, False, DTYPE)
    key = _load_rows(key_ptr, key_pool, slot, sequence, 1, local, head, every, KEY_STRIDE, H, D, C, True, DTYPE)
    value = _load_rows(
        value_ptr, value_pool, slot, sequence, 1, local, head, column, VALUE_STRIDE, H, D, C, True, DTYPE
    )
    pool = state_pool + (slot * H + head) * D * D
    state = tl.load(pool + every[:, None] * D + column[None, :])
    high = state.to(DTYPE)
    low = (state - high.to(tl.float32)).to(DTYPE)
    out = _attend(query, key, value, high, low, rate, C, TERMS, False) * scale
    at = tl.broadcast_to(out_ptr + (sequence * H + head) * D + column[None, :], (C, BLOCK))
    tl.store(at, out, mask=(local == 0)[:, None])
    open_row = ((slot * H + head) * C + row) * D
    tl.store(value_pool + open_row + column, tl.load(value_ptr + sequence * VALUE_STRIDE + head * D + column))
    if tl.program_id(0) % BLOCKS == 0:
        tl.store(key_pool + open_row + every, tl.load(key_ptr + sequence * KEY_STRIDE + head * D + every))
    if row == C - 1:
        for block in range(BLOCKS):
            key_column = block * BLOCK + tl.arange(0, BLOCK)
            part = _load_rows(
                key_ptr, key_pool, slot, sequence, 1, local, head, key_column, KEY_STRIDE, H, D, C, True, DTYPE
            )
            to = pool + key_column[:, None] * D + column[None, :]
            tl.store(to, _advance(tl.load(to), part, value, rate, C, False))


@jit()
def _commit_kernel(
    key_ptr, value_ptr, key_pool, value_pool, slots_ptr, begins_ptr, lengths_ptr, starts_ptr,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Puts the new tokens of a sequence's open chunk into the pools: after the tiles, which still read older ones."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin, length, start = _span(begins_ptr, lengths_ptr, starts_ptr, sequence)
    row, column = tl.arange(0, C), tl.arange(0, D)
    local = (start + length) // C * C - start + row
    inside = ((local >= 0) & (local < length))[:, None]
    token = (begin + local).to(tl.int64)[:, None]
    to = ((tl.load(slots_ptr + sequence) * H + head) * C + row)[:, None] * D + column[None, :]
    at = head * D + column[None, :]
    tl.store(key_pool + to, tl.load(key_ptr + token * KEY_STRIDE + at, mask=inside), mask=inside)
    tl.store(value_pool + to, tl.load(value_ptr + token * VALUE_STRIDE + at, mask=inside), mask=inside)


def _tiling(x: Tensor, chunk: int, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of a launch on x [T, H, d] with operands of `dtype`."""
    _, heads, dim = x.shape
    sizes = (16, 32, 64, 128)
    if dim not in sizes or chunk not in sizes:
        raise ValueError(f"head dimension {dim} with chunks of {chunk}: on a GPU both must be one of {sizes}")
    low = dtype == torch.bfloat16
    block = min(dim, 64 if low else 32)
    warps = 4 if low and chunk <= 64 else 8
    return {"H": heads, "D": dim, "C": chunk, "BLOCK": block, "DTYPE": triton_dtype(dtype), "warps": warps}


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, H, d] in `dtype`, each token's [H, d] dense and aligned, tokens at any distance."""
    x = x.to(dtype)
    dense = x.stride()[1:] == (x.shape[2], 1) and x.data_ptr() % ALIGNMENT == 0
    return x if dense and x.stride(0) * x.element_size() % ALIGNMENT == 0 else aligned(x)


def _operand_dtype(v: Tensor) -> torch.dtype:
    return torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32


def _pools(cache: LightningCache | None, unread: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (unread,) * 4 if cache is None else (cache.state, cache.key, cache.value, cache.slots)


def _triton_states(
    key: Tensor, value: Tensor, decay: DecayTables, layout: ChunkLayout, dtype: torch.dtype, terms: int,
    reverse: bool = False, cache: LightningCache | None = None,
) -> Tensor:  # fmt: skip
    """Sums of key^T value in front of each tile, or behind it, [N, H, terms, d, d] in `dtype`. Advances the cache."""
    tables, tiling = layout.tables, _tiling(key, layout.chunk_size, dtype)
    heads, dim = key.shape[1:]
    states = like(key, layout.num_tiles, heads, terms, dim, dim, dtype=dtype)
    grid = (len(layout.lengths) * (dim // tiling["BLOCK"]) ** 2, heads)
    launch(
        _scan_kernel, grid, key, value, states, decay.rate, *_pools(cache, key), tables.begins, tables.lengths,
        tables.starts, tables.sequence_tiles, len(layout.ranks), KEY_STRIDE=key.stride(0), VALUE_STRIDE=value.stride(0),
        TERMS=terms, REVERSE=reverse, CACHED=cache is not None, stages=3, **tiling,
    )  # fmt: skip
    return states


def _triton_tiles(
    query: Tensor, key: Tensor, value: Tensor, states: Tensor, decay: DecayTables, layout: ChunkLayout,
    reverse: bool = False, turned: bool = False, cache: LightningCache | None = None,
) -> Tensor:  # fmt: skip
    """Attention within the tiles and to the states, FP32 [T, H, d]."""
    tables, tiling = layout.tables, _tiling(query, layout.chunk_size, query.dtype)
    _, key_pool, value_pool, slots = _pools(cache, key)
    out = like(query, *query.shape)
    launch(
        _tile_kernel, (layout.num_tiles * query.shape[2] // tiling["BLOCK"], query.shape[1]), query, key, value, states,
        out, decay.rate, _scale(query), key_pool, value_pool, slots, tables.begins, tables.lengths, tables.starts,
        tables.tile_sequence, tables.tile_chunk, QUERY_STRIDE=query.stride(0), KEY_STRIDE=key.stride(0),
        VALUE_STRIDE=value.stride(0), TERMS=states.shape[2], REVERSE=reverse, CACHED=cache is not None, TURNED=turned,
        **tiling,
    )  # fmt: skip
    return out


def _state_terms(dtype: torch.dtype) -> int:
    """Operands that hold an FP32 state. Two of BF16 keep 16 bits; a third changes no digit of the output's error, a
    single one adds 40% to that of a slow head (measured)."""
    return 2 if dtype == torch.bfloat16 else 1


def _triton_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: DecayTables, layout: ChunkLayout
) -> tuple[Tensor, tuple[Tensor, ...]]:
    dtype = _operand_dtype(v)
    q, k, v = _operand(q, dtype), _operand(k, dtype), _operand(v, dtype)
    states = _triton_states(k, v, decay, layout, dtype, _state_terms(dtype))
    return _triton_tiles(q, k, v, states, decay, layout), (q, k, v)


def _triton_backward(
    saved: tuple[Tensor, ...], grad: Tensor, decay: DecayTables, layout: ChunkLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """dq is the attention of dO to v with values k; dk and dv are attentions too, in reversed time. The states are
    computed again, because they are larger than all else that would be kept."""
    q, k, v = saved
    grad = _operand(grad, q.dtype)
    states = _triton_states(k, v, decay, layout, q.dtype, 1)
    dq = _triton_tiles(grad, v, k, states, decay, layout, turned=True)
    states = _triton_states(q, grad, decay, layout, q.dtype, 1, reverse=True)
    dk = _triton_tiles(v, grad, q, states, decay, layout, reverse=True, turned=True)
    return dq, dk, _triton_tiles(k, q, grad, states, decay, layout, reverse=True)


def _triton_cached(
    q: Tensor, k: Tensor, v: Tensor, decay: DecayTables, layout: ChunkLayout, cache: LightningCache
) -> Tensor:
    dtype, tables = _operand_dtype(v), layout.tables
    if dtype == torch.float32 and cache.key.dtype != torch.float32:
        raise ValueError(f"values of {v.dtype} do not fit into a cache of {cache.key.dtype}: make the cache float32")
    cache = replace(cache, slots=aligned(cache.slots))
    q, k, v = (_operand(x.to(dtype), pool) for x, pool in ((q, dtype), (k, cache.key.dtype), (v, cache.value.dtype)))
    if layout.is_decode:
        return _triton_decode(q, k, v, decay, layout, cache)
    states = _triton_states(k, v, decay, layout, dtype, _state_terms(dtype), cache=cache)
    o = _triton_tiles(q, k, v, states, decay, layout, cache=cache)
    launch(
        _commit_kernel, (len(layout.lengths), q.shape[1]), k, v, cache.key, cache.value, cache.slots, tables.begins,
        tables.lengths, tables.starts, KEY_STRIDE=k.stride(0), VALUE_STRIDE=v.stride(0), H=q.shape[1], D=q.shape[2],
        C=layout.chunk_size,
    )  # fmt: skip
    return o


def _triton_decode(
    q: Tensor, k: Tensor, v: Tensor, decay: DecayTables, layout: ChunkLayout, cache: LightningCache
) -> Tensor:
    out, tiling = like(q, *q.shape), _tiling(q, layout.chunk_size, q.dtype)
    launch(
        _decode_kernel, (len(q) * q.shape[2] // tiling["BLOCK"], q.shape[1]), q, k, v, out, decay.rate, _scale(q),
        cache.state, cache.key, cache.value, cache.slots, layout.tables.starts, QUERY_STRIDE=q.stride(0),
        KEY_STRIDE=k.stride(0), VALUE_STRIDE=v.stride(0), TERMS=_state_terms(q.dtype), **tiling,
    )  # fmt: skip
    return out


# The fast form of the cached operator: the recurrence itself. The state is that after the last token, the open chunk is
# not used, and bits differ from those of the tiles.


@jit()
def _recurrence_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, rate_ptr, scale, state_pool, slots_ptr, begins_ptr, lengths_ptr,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = D // BLOCK
    sequence, head = tl.program_id(0) // BLOCKS, tl.program_id(1)
    every, column = tl.arange(0, D), tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    pool = state_pool + (tl.load(slots_ptr + sequence) * H + head) * D * D + every[:, None] * D + column[None, :]
    state, decay = tl.load(pool), tl.exp2(-tl.load(rate_ptr + head))
    begin = tl.load(begins_ptr + sequence).to(tl.int64)
    for token in range(begin, begin + tl.load(lengths_ptr + sequence)):
        query = tl.load(query_ptr + token * QUERY_STRIDE + head * D + every).to(tl.float32)
        key = tl.load(key_ptr + token * KEY_STRIDE + head * D + every).to(tl.float32)
        value = tl.load(value_ptr + token * VALUE_STRIDE + head * D + column).to(tl.float32)
        state = state * decay + key[:, None] * value[None, :]
        out = tl.sum(query[:, None] * state, axis=0) * scale
        tl.store(out_ptr + (token * H + head) * D + column, out)
    tl.store(pool, state)


_RECURRENCE_BLOCK = 32


def _triton_recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: DecayTables, layout: ChunkLayout, cache: LightningCache
) -> Tensor:
    q, k, v = (_operand(x, x.dtype) for x in (q, k, v))
    (_, heads, dim), tables = q.shape, layout.tables
    out, block = like(q, *q.shape), min(dim, _RECURRENCE_BLOCK)
    launch(
        _recurrence_kernel, (len(layout.lengths) * dim // block, heads), q, k, v, out, decay.rate, _scale(q),
        cache.state, aligned(cache.slots), tables.begins, tables.lengths, QUERY_STRIDE=q.stride(0),
        KEY_STRIDE=k.stride(0), VALUE_STRIDE=v.stride(0), H=heads, D=dim, BLOCK=block,
    )  # fmt: skip
    return out


def _cpu_recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: DecayTables, layout: ChunkLayout, cache: LightningCache
) -> Tensor:
    """All sequences step by step together."""
    q, k, v = _scaled(q, k, v)
    begins = torch.from_numpy(layout.lengths.cumsum() - layout.lengths)
    o = torch.empty_like(q)
    for step in range(int(layout.lengths.max())):
        active = torch.from_numpy((layout.lengths > step).nonzero()[0])
        token, slots = begins[active] + step, cache.slots[active]
        state = cache.state[slots] * decay.query[:, :1] + k[token, :, :, None] * v[token, :, None]
        cache.state[slots] = state
        o[token] = (q[token, :, None] @ state).squeeze(2)
    return o


class _Lightning(torch.autograd.Function):
    """Packed sequences from position 0."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: DecayTables, layout: ChunkLayout) -> Tensor:
        ctx.path = choose("lightning_attention_training", q)  # a name of its own: only the cached form has a fast one
        forward = _triton_forward if ctx.path is Path.TRITON else _cpu_forward
        o, saved = forward(q, k, v, decay, layout)
        ctx.save_for_backward(*saved)
        ctx.decay, ctx.layout, ctx.dtypes = decay, layout, (q.dtype, k.dtype, v.dtype)
        return o

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        backward = _triton_backward if ctx.path is Path.TRITON else _cpu_backward
        gradients = backward(ctx.saved_tensors, grad, ctx.decay, ctx.layout)
        dq, dk, dv = (x.to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True))
        return dq, dk, dv, None, None


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: DecayTables, layout: ChunkLayout, cache: LightningCache | None = None
) -> Tensor:
    """q, k, v [T, H, d] -> FP32 [T, H, d]. With a cache there is no gradient, and the pools take in the new tokens.

    On a GPU d and the chunk length are 16, 32, 64 or 128: ValueError for others.
    """
    if cache is None:
        o: Tensor = apply(_Lightning, q, k, v, decay, layout)
        return o
    path = choose("lightning_attention", q)
    if path is Path.FAST:
        recurrence = _triton_recurrence if choose("lightning_recurrence", q) is Path.TRITON else _cpu_recurrence
        return recurrence(q, k, v, decay, layout, cache)
    if path is Path.TRITON:
        return _triton_cached(q, k, v, decay, layout, cache)
    return _cpu_attend(q, k, v, decay, layout, cache, cache.state.new_empty(0, *cache.state.shape[1:]))
