"""Slots and blocks: what is taken is owned, what is shared is counted, and a mistake of ours is an assertion."""

import pytest

from rollout.memory import BlockPool, SlotPool


def test_slots_are_taken_lowest_first_and_come_back() -> None:
    pool = SlotPool(3)
    assert pool.take(2) == [0, 1]
    assert pool.num_free == 1
    pool.give_back(0)
    assert pool.num_free == 2
    assert sorted(pool.take(2)) == [0, 2]


def test_slots_refuse_too_many_and_a_second_give_back() -> None:
    pool = SlotPool(3)
    with pytest.raises(AssertionError, match="4 slots asked, 3 free"):
        pool.take(4)
    (slot,) = pool.take(1)
    pool.give_back(slot)
    with pytest.raises(AssertionError, match="slot 0 given back twice"):
        pool.give_back(slot)


def test_a_block_is_free_after_its_last_owner() -> None:
    pool = BlockPool(4)
    shared, own = pool.take(2)
    pool.hold([shared], 2)
    pool.give_back([shared, own])
    assert pool.num_free == 3
    pool.give_back([shared])
    assert pool.num_free == 3
    pool.give_back([shared])
    assert pool.num_free == 4


def test_blocks_refuse_too_many_a_second_give_back_and_holding_what_has_no_content() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 blocks asked, 2 free"):
        pool.take(3)
    with pytest.raises(AssertionError, match="block 1 is held but has no content"):
        pool.hold([1])
    blocks = pool.take(1)
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match="block 0 given back twice"):
        pool.give_back(blocks)


def test_blocks_without_content_are_taken_before_cached_ones_and_those_from_the_end_of_the_oldest_prefix() -> None:
    pool, reused = BlockPool(6), []
    pool.on_reuse = reused.append
    first, second = pool.take(2), pool.take(2)
    pool.cached |= {*first, *second}
    pool.give_back(first)
    pool.give_back(second)
    assert (pool.num_free, pool.num_idle([0, 5])) == (6, 2)
    assert pool.take(2) == [4, 5]
    assert reused == []
    assert pool.take(3) == [first[1], first[0], second[1]] == reused
    assert pool.cached == {second[0]}


def test_the_lowest_empty_block_is_taken_first() -> None:
    pool = BlockPool(5)
    blocks = pool.take(5)
    for block in (3, 1, 4):
        pool.give_back([blocks[block]])
    assert pool.take(3) == [1, 3, 4]


def test_a_cached_block_that_nobody_holds_can_be_held_again() -> None:
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.cached.add(blocks[0])
    pool.give_back(blocks)
    pool.hold(blocks)
    assert (pool.num_free, pool.num_idle(blocks)) == (1, 0)
    assert pool.take(1) == [1]
    pool.give_back(blocks)
    assert pool.num_free == 1


def test_forgotten_content_is_worth_nothing() -> None:
    pool = BlockPool(3)
    blocks = pool.take(2)
    pool.cached |= {*blocks}
    pool.give_back(blocks)
    pool.forget_cached()
    with pytest.raises(AssertionError, match="held but has no content"):
        pool.hold(blocks)
    assert pool.take(3) == [0, 1, 2]
