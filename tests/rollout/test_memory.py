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


def test_a_shared_block_is_free_after_its_last_owner() -> None:
    pool = BlockPool(4)
    shared, own = pool.take(2)
    pool.share([shared], 2)
    pool.give_back([shared, own])
    assert pool.num_free == 3
    pool.give_back([shared])
    assert pool.num_free == 3
    pool.give_back([shared])
    assert pool.num_free == 4


def test_blocks_refuse_too_many_a_second_give_back_and_sharing_what_nobody_owns() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 blocks asked, 2 free"):
        pool.take(3)
    with pytest.raises(AssertionError, match="block 1 is shared but nobody owns it"):
        pool.share([1], 1)
    blocks = pool.take(1)
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match="block 0 given back twice"):
        pool.give_back(blocks)


def test_sharing_with_nobody_changes_nothing() -> None:
    pool = BlockPool(1)
    blocks = pool.take(1)
    pool.share(blocks, 0)
    pool.give_back(blocks)
    assert pool.num_free == 1
