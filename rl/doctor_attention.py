"""The attention probes of `lockstep doctor` (design A3, A4): training against chunked prefill and decode, in any batch.

A row of these probes is a whole sequence; shorter ones are filled with zeros to the longest.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import ops
from rl.doctor_probe import RowPath, normal

HEADS, KV_HEADS, HEAD_DIM, CHUNK = 4, 2, 32, 16
SEQUENCES, FIRST_PIECE, DECODED = 40, 13, 6
# The first decoded token opens a chunk in some sequences and fills one in others.
LENGTHS = 36 + np.arange(SEQUENCES) % 17

Attend = Callable[[Tensor, ops.ChunkLayout, range | None], Tensor]


def lightning_attention(dtype: torch.dtype) -> dict[str, RowPath]:
    q, k, v = _tokens(HEADS, dtype)
    decay = ops.DecayTables.build(torch.tensor([2.0 ** -(2 * head + 2) for head in range(HEADS)]), CHUNK)
    state, keys, values = (torch.zeros(SEQUENCES, HEADS, size, HEAD_DIM) for size in (HEAD_DIM, CHUNK, CHUNK))

    def attend(tokens: Tensor, layout: ops.ChunkLayout, sequences: range | None) -> Tensor:
        if sequences is None:
            return ops.lightning_attention(q[tokens], k[tokens], v[tokens], decay, layout)
        slots = torch.tensor(sequences)
        state[slots[torch.from_numpy(layout.starts == 0)]] = 0.0
        cache = ops.LightningCache(state, keys, values, slots)
        return ops.lightning_attention(q[tokens], k[tokens], v[tokens], decay, layout, cache)

    return _attention_paths(attend)


def softmax_attention(dtype: torch.dtype) -> dict[str, RowPath]:
    q, k, v = _tokens(KV_HEADS, dtype)
    blocks = -(-int(LENGTHS.max()) // CHUNK)
    keys, values = (torch.zeros(SEQUENCES * blocks, KV_HEADS, CHUNK, HEAD_DIM) for _ in "kv")

    def attend(tokens: Tensor, layout: ops.ChunkLayout, sequences: range | None) -> Tensor:
        if sequences is None:
            return ops.softmax_attention(q[tokens], k[tokens], v[tokens], layout)
        table = np.asarray(sequences)[:, None] * blocks + np.arange(blocks)
        return ops.softmax_attention(q[tokens], k[tokens], v[tokens], layout, ops.PagedCache(keys, values, table))

    return _attention_paths(attend)


def _tokens(kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q and k as RoPE leaves them, in FP32; v as the projection leaves it, in the working dtype."""
    total = int(LENGTHS.sum())
    shape = (total, kv_heads, HEAD_DIM)
    return normal(total, HEADS, HEAD_DIM), normal(*shape, seed=1), normal(*shape, seed=2).to(dtype)


def _attention_paths(attend: Attend) -> dict[str, RowPath]:
    first_token = np.cumsum(LENGTHS) - LENGTHS

    def run(sequences: range, begin: np.ndarray, end: np.ndarray, cached: bool) -> Sequence[Tensor]:
        """Outputs of tokens begin .. end of each of the sequences, in one call."""
        pieces = [
            np.arange(first_token[s] + b, first_token[s] + e) for s, b, e in zip(sequences, begin, end, strict=True)
        ]
        layout = ops.ChunkLayout.build((end - begin).tolist(), CHUNK, begin.tolist())
        out = attend(torch.from_numpy(np.concatenate(pieces)), layout, sequences if cached else None)
        return out.split((end - begin).tolist())

    def training(rows: slice) -> Tensor:
        end = LENGTHS[rows]
        return _padded(run(range(SEQUENCES)[rows], np.zeros_like(end), end, cached=False))

    def prefill_and_decode(rows: slice) -> Tensor:
        end = LENGTHS[rows]
        cuts = [np.zeros_like(end), np.full_like(end, FIRST_PIECE), *(end - left for left in range(DECODED, -1, -1))]
        parts = [run(range(SEQUENCES)[rows], *cut, cached=True) for cut in itertools.pairwise(cuts)]
        return _padded([torch.cat(own) for own in zip(*parts, strict=True)])

    return {"training": training, "chunked prefill and decode": prefill_and_decode}


def _padded(outputs: Sequence[Tensor]) -> Tensor:
    """One row for each sequence, all of the longest length, so that batches can be compared row by row."""
    rows = pad_sequence(list(outputs), batch_first=True)
    missing = int(LENGTHS.max()) - rows.shape[1]
    return F.pad(rows, (0, 0, 0, 0, 0, missing))
