"""ChunkLayout: which row of which tile a token sits in."""

from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ops


def test_positions_and_rows_of_a_mixed_batch() -> None:
    """Chunks of 16. One sequence decodes position 20, one starts, one goes on from 14 across a boundary."""
    layout = ops.ChunkLayout.build([1, 2, 4], 16, starts=[20, 0, 14])
    assert layout.position_ids.tolist() == [20, 0, 1, 14, 15, 16, 17]
    assert [slot % 16 for slot in layout.token_slot.tolist()] == [4, 0, 1, 14, 15, 0, 1]
    assert (layout.num_tokens, layout.num_tiles, layout.is_decode) == (7, 4, False)
    assert layout.last_tokens().tolist() == [0, 2, 6]


def test_one_token_each_is_decode() -> None:
    assert ops.ChunkLayout.build([1, 1], 16, starts=[3, 99]).is_decode


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(0, 70)), min_size=1, max_size=6), st.sampled_from([16, 32]))
def test_tiles_hold_every_token_once(sequences: list[tuple[int, int]], chunk: int) -> None:
    lengths, starts = zip(*sequences, strict=True)
    layout = ops.ChunkLayout.build(lengths, chunk, starts)
    x = torch.arange(1.0, 1 + 2 * 3 * sum(lengths)).view(-1, 2, 3)
    tiles = layout.into_tiles(x)
    assert tiles.shape == (layout.num_tiles, 2, chunk, 3)
    assert torch.equal(layout.from_tiles(tiles), x)
    assert tiles.count_nonzero() == x.numel()
    touched = sum((start + length - 1) // chunk - start // chunk + 1 for length, start in sequences)
    assert layout.num_tiles == touched
    assert layout.position_ids.tolist() == [p for n, start in sequences for p in range(start, start + n)]


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_empty_sequences_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        ops.ChunkLayout.build(lengths, 16)


def test_a_plan_is_made_once_for_each_source() -> None:
    layout, numbers, one, other = ops.ChunkLayout.build([1], 16), count(), [1], [1]
    assert [layout.planned("next", source, numbers.__next__) for source in (one, one, other, one)] == [0, 0, 1, 0]
