"""Admission and prompt pieces, by hand: chunk 16, 4 slots, 10 blocks, 24 prompt tokens a step."""

import pytest

from rollout.memory import BlockPool, SlotPool
from rollout.scheduler import Group, Scheduler
from tests.rollout.tiny import make_request


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(SlotPool(4), BlockPool(10), chunk_size=16, prefill_tokens=24)


def wait(scheduler: Scheduler, request_id: int, length: int, num_samples: int, max_new_tokens: int = 8) -> Group:
    request = make_request(request_id, length, num_samples, max_new_tokens)
    group = Group(request, range(num_samples))
    scheduler.waiting.append(group)
    return group


def pieces(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    return [(piece.group.request.request_id, piece.begin, piece.end) for piece in scheduler.next_pieces()]


@pytest.mark.parametrize(
    ("length", "max_new_tokens", "blocks"),
    [(1, 1, (0, 1)), (15, 1, (0, 1)), (15, 2, (0, 2)), (16, 16, (1, 1)), (17, 15, (1, 1)), (33, 40, (2, 3))],
)
def test_full_prompt_blocks_are_shared_and_the_rest_is_owned(scheduler, length, max_new_tokens, blocks) -> None:
    assert scheduler.blocks_needed(make_request(0, length, 1, max_new_tokens)) == blocks


def test_admission_takes_slots_and_blocks_and_shares_the_prompt(scheduler) -> None:
    group = wait(scheduler, 0, length=33, num_samples=3)
    assert scheduler.admit() == [group]
    assert (scheduler.slots.num_free, scheduler.blocks.num_free) == (1, 5)
    assert [scheduler.block_row(group, index).tolist() for index in range(3)] == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    for index, free in enumerate((6, 7, 10)):
        scheduler.release(group, index)
        assert scheduler.blocks.num_free == free
    assert scheduler.slots.num_free == 4


def test_first_come_first_served_even_when_a_later_one_would_fit(scheduler) -> None:
    first = wait(scheduler, 0, length=10, num_samples=3)
    wait(scheduler, 1, length=10, num_samples=2)  # 1 slot is left
    wait(scheduler, 2, length=10, num_samples=1)
    assert scheduler.admit() == [first]
    assert [group.request.request_id for group in scheduler.waiting] == [1, 2]


def test_blocks_bound_admission_too(scheduler) -> None:
    wait(scheduler, 0, length=90, num_samples=1, max_new_tokens=38)  # 8 of 10 blocks
    wait(scheduler, 1, length=40, num_samples=1)  # 3 blocks
    assert [group.request.request_id for group in scheduler.admit()] == [0]


def test_prompts_are_cut_at_the_token_budget_and_the_rest_of_it_goes_to_the_next(scheduler) -> None:
    wait(scheduler, 0, length=40, num_samples=2)
    wait(scheduler, 1, length=24, num_samples=1)
    scheduler.admit()
    assert pieces(scheduler) == [(0, 0, 24)]
    assert scheduler.advance(scheduler.next_pieces()) == []
    assert pieces(scheduler) == [(0, 24, 40), (1, 0, 8)]
    assert [group.request.request_id for group in scheduler.advance(scheduler.next_pieces())] == [0]
    assert pieces(scheduler) == [(1, 8, 24)]
    assert [group.request.request_id for group in scheduler.advance(scheduler.next_pieces())] == [1]
    assert scheduler.prefilling == []
    assert pieces(scheduler) == []


def test_dropping_gives_back_what_a_prefill_held_and_leaves_the_others(scheduler) -> None:
    for request_id in (0, 1):
        wait(scheduler, request_id, length=20, num_samples=2)
    scheduler.admit()
    for request_id in (0, 2):
        wait(scheduler, request_id, length=20, num_samples=1)
    assert [len(group.samples) for group in scheduler.drop(0)] == [2, 1]
    assert [group.request.request_id for group in scheduler.prefilling] == [1]
    assert [group.request.request_id for group in scheduler.waiting] == [2]
    assert (scheduler.slots.num_free, scheduler.blocks.num_free) == (2, 7)
    assert scheduler.drop(0) == []
