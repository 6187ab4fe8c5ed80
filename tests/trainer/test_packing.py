"""Micro-batches under a token budget."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.packing import pack_under_budget

LENGTHS = st.lists(st.integers(1, 50), max_size=40)
BUDGET = st.integers(1, 120)


def test_longest_first_into_the_first_gap() -> None:
    assert pack_under_budget([3, 7, 5, 5, 2], 10) == [[0, 1], [2, 3], [4]]


def test_equal_lengths_keep_their_order() -> None:
    assert pack_under_budget([4, 4, 4, 4, 4], 8) == [[0, 1], [2, 3], [4]]


def test_a_longer_sequence_gets_a_micro_batch_of_its_own() -> None:
    assert pack_under_budget([1, 20, 1], 8) == [[1], [0, 2]]


def test_no_sequences_need_no_micro_batch() -> None:
    assert pack_under_budget([], 8) == []


@given(LENGTHS, BUDGET)
def test_each_sequence_is_in_exactly_one_micro_batch(lengths: list[int], token_budget: int) -> None:
    micro_batches = pack_under_budget(lengths, token_budget)
    assert sorted(index for micro_batch in micro_batches for index in micro_batch) == list(range(len(lengths)))


@given(LENGTHS, BUDGET)
def test_no_micro_batch_of_several_exceeds_the_budget(lengths: list[int], token_budget: int) -> None:
    for micro_batch in pack_under_budget(lengths, token_budget):
        assert len(micro_batch) == 1 or sum(lengths[index] for index in micro_batch) <= token_budget


@given(LENGTHS, BUDGET)
def test_at_most_one_micro_batch_is_half_empty(lengths: list[int], token_budget: int) -> None:
    micro_batches = pack_under_budget(lengths, token_budget)
    tokens = [sum(lengths[index] for index in micro_batch) for micro_batch in micro_batches]
    assert sum(2 * used <= token_budget for used in tokens) <= 1
