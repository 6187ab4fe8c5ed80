"""Softmax attention decoding on a CPU: however keys lie in the pool, and whoever decodes, the bits of training."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops import softmax_decode
from ops.layout import ChunkLayout
from ops.softmax_attention import PagedCache, softmax_attention

CHUNK, HEADS, KV_HEADS, DIM = 16, 4, 2, 8
Tables = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks to a segment, so that short sequences have several."""
    monkeypatch.setattr(softmax_decode, "SEGMENT", 4 * CHUNK)


def tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    q, k, v = (torch.randn(count, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


def tables(sequences: int, width: int) -> Tables:
    """Blocks of equal position side by side, blocks of a sequence side by side, and no order at all."""
    by_position = np.arange(sequences * width).reshape(width, sequences).T
    return {
        "position": by_position,
        "sequence": np.arange(sequences * width).reshape(sequences, width),
        "shuffled": np.random.default_rng(0).permutation(sequences * width).reshape(sequences, width),
    }


def run_cached(lengths: list[int], cuts: list[list[int]], table: np.ndarray) -> Tensor:
    """Every sequence in steps that end at its cuts; outputs of all its tokens, sequences one after another."""
    parts = [tokens(length) for length in lengths]
    key, value = torch.zeros(2, int(table.max()) + 1, KV_HEADS, CHUNK, DIM).unbind(0)
    outputs: list[list[Tensor]] = [[] for _ in lengths]
    begins = [0] * len(lengths)
    for step in range(max(len(own) for own in cuts)):
        rows = [s for s, own in enumerate(cuts) if step < len(own)]
        counts = [cuts[s][step] - begins[s] for s in rows]
        q, k, v = (
            torch.cat([parts[s][i][begins[s] : begins[s] + n] for s, n in zip(rows, counts, strict=True)])
            for i in range(3)
        )
        layout = ChunkLayout.build(counts, CHUNK, [begins[s] for s in rows])
        out = softmax_attention(q, k, v, layout, PagedCache(key, value, table[rows]))
        for s, new in zip(rows, out.split(counts), strict=True):
            outputs[s].append(new)
            begins[s] += len(new)
    return torch.cat([torch.cat(each) for each in outputs])


def run_training(lengths: list[int]) -> Tensor:
    q, k, v = (torch.cat(x) for x in zip(*(tokens(length) for length in lengths), strict=True))
    return softmax_attention(q, k, v, ChunkLayout.build(lengths, CHUNK))


@pytest.mark.parametrize("kind", ["position", "sequence", "shuffled"])
def test_decode_has_the_bits_of_training_however_keys_lie(kind: str) -> None:
    lengths = [150, 149, 100, 81, 66, 65, 64, 50, 33, 31, 17, 16, 5, 2]
    cuts = [[length - 2, length - 1, length] if length > 2 else [1, 2] for length in lengths]
    table = tables(len(lengths), 10)[kind]
    assert torch.equal(run_cached(lengths, cuts, table), run_training(lengths))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_single_tokens_and_pieces_in_one_forward_have_the_bits_of_training(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 140), min_size=1, max_size=5))
    cuts = [sorted({*data.draw(st.lists(st.integers(1, length), max_size=4)), length}) for length in lengths]
    assert torch.equal(run_cached(lengths, cuts, tables(len(lengths), 9)["shuffled"]), run_training(lengths))


def test_neighbouring_blocks_are_read_where_they_lie() -> None:
    layout = ChunkLayout.build([1] * 16, CHUNK, [40] * 16)
    for kind, is_view in (("position", True), ("shuffled", False)):
        (piece,) = softmax_decode.plan_decode(layout, tables(16, 3)[kind], most_pairs=1000)
        assert isinstance(piece, softmax_decode.DecodePiece)
        assert [(len(blocks.runs), blocks.gathered is None) for blocks in piece.blocks] == [(int(is_view), is_view)] * 3


def test_sums_run_in_segments() -> None:
    """(1 + 2^-24) + (2^-24 + 2^-24): the first sum rounds to 1, the second is 2^-23, which 1 takes in whole. One after
    another each 2^-24 would be lost."""
    small = 2.0**-24
    parts = torch.tensor([1.0, small, small, small])
    assert softmax_decode.fold(parts, 2).item() == 1 + 2**-23
    assert softmax_decode.fold(parts, 4).item() == 1.0
    assert softmax_decode.fold(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), 2).item() == 31.0
