"""Softmax attention of single new tokens on a CPU: the sums of `ops.softmax_attention`, arranged for decoding.

Keys are read where they lie: sequences whose blocks of one position are neighbours in the pool multiply a view of it,
and only the others are gathered. Which of the two is taken moves no bit, as both are the same products.

Sums over the keys run in segments: within one in ascending order, then over segments as they ascend. `fold` states it.

Letters: S sequences, P pairs of a sequence and a key block, H heads, K key-value heads, C block length, d head
dimension, R query rows of a key-value head.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ops.layout import ChunkLayout
from ops.linear import BMM_MIN_ROWS, bmm

SEGMENT = 1024  # positions whose key blocks are summed before they join the total; a multiple of most block lengths
LEAST_RUN = 8  # sequences that share one product of views on the average; below, gathering costs less than the calls


def blocks_per_segment(chunk_size: int) -> int:
    return max(1, SEGMENT // chunk_size)


def fold(parts: Tensor, segment: int) -> Tensor:
    """parts [blocks, ...] -> their sum [...], in the order of all softmax attention on a CPU: with `segment` 16,
    ((b0 + b1) ... + b15) + ((b16 + b17) ... + b31) + ..."""
    whole = len(parts) // segment * segment
    sums = [_in_order(parts[:whole].unflatten(0, (-1, segment)).transpose(0, 1))] if whole else []
    if len(parts) > whole:
        sums.append(_in_order(parts[whole:].unsqueeze(1)))
    return _in_order(torch.cat(sums))


def _in_order(parts: Tensor) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:].unbind(0):
        total += part
    return total


@dataclass(frozen=True)
class _KeyBlocks:
    """Key block number i of the first `count` sequences of a piece; `ending` of these see no later one."""

    count: int
    ending: int
    runs: tuple[tuple[int, int, int], ...]  # (first sequence, end, first block in the pool) where blocks are neighbours
    gathered: Tensor | None  # [count] blocks in the pool where they are not


@dataclass(frozen=True)
class DecodePiece:
    """Sequences that are computed at once, those with most key blocks first, and their key blocks as they ascend."""

    order: Tensor | None  # [S] sequences; None for all in the given order
    blocks: tuple[_KeyBlocks, ...]
    future: Tensor  # bool [S, 1, 1, C]: keys after the query in its own block


@dataclass(frozen=True)
class LongSequence:
    """One sequence whose key blocks fill more than a segment, computed alone: it has work enough."""

    order: Tensor  # [1] which sequence
    blocks: slice | Tensor  # where its key blocks are in the pool
    future: Tensor  # bool [C]: keys after the query in its own block


def plan_decode(
    layout: ChunkLayout, block_table: np.ndarray, most_pairs: int
) -> tuple[DecodePiece | LongSequence, ...]:
    """What is computed at once: long sequences alone, others together, up to `most_pairs` pairs."""
    chunks, pieces = layout.tile_chunk, list[DecodePiece | LongSequence]()
    is_sorted = bool((chunks[1:] <= chunks[:-1]).all())
    order = np.arange(len(chunks)) if is_sorted else np.argsort(-chunks, kind="stable")
    long = int((chunks >= blocks_per_segment(layout.chunk_size)).sum())
    future = torch.arange(layout.chunk_size) > layout.token_row.unsqueeze(1)
    for sequence in order[:long].tolist():
        places = block_table[sequence, : chunks[sequence] + 1]
        neighbours = bool((np.diff(places) == 1).all())
        blocks = slice(int(places[0]), int(places[-1]) + 1) if neighbours else torch.from_numpy(places.copy())
        pieces.append(LongSequence(torch.tensor([sequence]), blocks, future[sequence]))
    begin = long
    while begin < len(order):
        # The first sequence sees the most key blocks, so it bounds what a piece needs.
        part = order[begin : begin + max(1, most_pairs // int(chunks[order[begin]] + 1))]
        whole = is_sorted and len(part) == len(order)
        pieces.append(_piece(part, chunks[part], block_table[part], future, whole))
        begin += len(part)
    return tuple(pieces)


def _piece(part: np.ndarray, chunks: np.ndarray, table: np.ndarray, future: Tensor, whole: bool) -> DecodePiece:
    order = torch.from_numpy(part)
    counts = (chunks[None] >= np.arange(chunks[0] + 2)[:, None]).sum(1).tolist()
    blocks = [_key_blocks(table[:count, i], counts[i + 1]) for i, count in enumerate(counts[:-1])]
    return DecodePiece(None if whole else order, tuple(blocks), future[order][:, None, None])


def _key_blocks(places: np.ndarray, going_on: int) -> _KeyBlocks:
    bounds = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    if len(places) >= LEAST_RUN * (len(bounds) - 2):
        runs = tuple((a, b, int(places[a])) for a, b in pairwise(bounds))
        return _KeyBlocks(len(places), len(places) - going_on, runs, None)
    return _KeyBlocks(len(places), len(places) - going_on, (), torch.from_numpy(places.copy()))


def decode(q: Tensor, keys: Tensor, values: Tensor, pieces: tuple[DecodePiece | LongSequence, ...]) -> Tensor:
    """q FP32 [S, H, d], scaled; keys and values FP32 [blocks, K, C, d] -> FP32 [S, H, d]."""
    kv_heads, group = keys.shape[1], q.shape[1] // keys.shape[1]
    copies = -(-BMM_MIN_ROWS // group)  # fewer rows would have other bits
    rows = q.unsqueeze(2).expand(-1, -1, copies, -1).reshape(len(q), kv_heads, group * copies, -1)
    out = torch.empty_like(q)
    for piece in pieces:
        mine = rows if piece.order is None else rows.index_select(0, piece.order)
        if isinstance(piece, LongSequence):
            part = _attend_long(mine, keys, values, piece)
        else:
            part = _attend(mine, keys, values, piece)
        part = part[:, :, ::copies].reshape(-1, *q.shape[1:])
        if piece.order is None:
            return part
        out.index_copy_(0, piece.order, part)
    return out


def _attend_long(rows: Tensor, keys: Tensor, values: Tensor, piece: LongSequence) -> Tensor:
    """rows [1, K, R, d] -> [1, K, R, d]."""
    keys, values = keys[piece.blocks], values[piece.blocks]
    (count, kv_heads, chunk), num_rows = keys.shape[:3], rows.shape[2]
    scores = bmm(rows.expand(count, -1, -1, -1), keys.transpose(2, 3))
    scores[-1].masked_fill_(piece.future, float("-inf"))
    weights = scores.sub_(scores.amax((0, 3)).unsqueeze(-1)).exp_()
    segment = blocks_per_segment(chunk)
    out, total = fold(bmm(weights, values), segment), fold(weights.sum(-1), segment)
    return out.div_(total.unsqueeze(-1)).view(1, kv_heads, num_rows, -1)


def _attend(rows: Tensor, keys: Tensor, values: Tensor, piece: DecodePiece) -> Tensor:
    """rows [S, K, R, d] -> [S, K, R, d]."""
    counts = [blocks.count for blocks in piece.blocks]
    scores = rows.new_empty(sum(counts), *rows.shape[1:3], keys.shape[2])
    top = rows.new_full(rows.shape[:3], float("-inf"))
    for blocks, part in zip(piece.blocks, scores.split(counts), strict=True):
        _multiply(rows, keys.transpose(2, 3), blocks, part)
        if blocks.ending:
            own = slice(blocks.count - blocks.ending, blocks.count)
            part[own].masked_fill_(piece.future[own], float("-inf"))
        torch.maximum(top[: blocks.count], part.amax(-1), out=top[: blocks.count])
    for part in scores.split(counts):
        part.sub_(top[: len(part)].unsqueeze(-1))
    totals = scores.exp_().sum(-1).split(counts)
    out, product = torch.empty_like(rows), torch.empty_like(rows)
    for index, (blocks, part) in enumerate(zip(piece.blocks, scores.split(counts), strict=True)):
        if index == 0:
            _multiply(part, values, blocks, out)
        else:
            _multiply(part, values, blocks, product[: blocks.count])
            out[: blocks.count] += product[: blocks.count]
            totals[0][: blocks.count] += totals[index]
    return out.div_(totals[0].unsqueeze(-1))


def _multiply(left: Tensor, pool: Tensor, blocks: _KeyBlocks, out: Tensor) -> None:
    """out [count, K, R, n] = left [>= count, K, R, m] @ the blocks of pool [blocks, K, m, n], each with its own."""
    if blocks.gathered is not None:
        _bmm(left[: blocks.count], pool.index_select(0, blocks.gathered), out)
    for begin, end, place in blocks.runs:
        _bmm(left[begin:end], pool[place : place + end - begin], out[begin:end])


def _bmm(left: Tensor, right: Tensor, out: Tensor) -> None:
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1))
