"""Admission, pieces and preemption, by hand: chunk 16, 4 slots, 10 blocks, 24 prompt tokens a step, no prefix cache."""

import numpy as np
import pytest
import torch

from policy.cache import CachePools
from rollout.memory import BlockPool, SlotPool
from rollout.running import Running
from rollout.scheduler import Scheduler, Waiting
from tests.rollout.tiny import make_policy, make_request


@pytest.fixture
def scheduler() -> Scheduler:
    config = make_policy(2).config
    pools = CachePools(config, 4, 10, torch.float32, torch.device("cpu"))
    return Scheduler(Running(4, config), pools, SlotPool(4), BlockPool(10), None, prefill_tokens=24, chunk_size=16)


def wait(scheduler: Scheduler, request_id: int, length: int, num_samples: int = 1, max_new_tokens: int = 60) -> None:
    request = make_request(request_id, length, num_samples, max_new_tokens)
    scheduler.waiting.append(Waiting(request, list(range(num_samples))))


def step(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    """One step without the forward: (request, first token, behind the last) of each row; every draw is a token 7."""
    batch = scheduler.next_batch()
    if batch is None:
        return []
    running = scheduler.running
    starts = running.computed[batch.slots]
    rows = list(
        zip(running.request_id[batch.slots].tolist(), starts.tolist(), (starts + batch.counts).tolist(), strict=True)
    )
    slots = batch.slots[scheduler.advance(batch)].tolist()
    for leader in sorted(scheduler.leaders & set(slots)):
        slots += scheduler.fork(leader)
    for slot in slots:
        running.tokens[slot, running.length[slot]] = 7
        running.length[slot] += 1
    return rows


def waiting(scheduler: Scheduler) -> list[tuple[int, list[int]]]:
    return [(item.request.request_id, item.samples) for item in scheduler.waiting]


def samples(scheduler: Scheduler) -> list[tuple[int, int]]:
    """(request, sample) of each slot in use, the oldest first."""
    found = [scheduler.running.sequence[slot] for slot in scheduler.running.by_age()]
    return [(sequence.request.request_id, sequence.sample) for sequence in found]


def test_prompts_are_cut_at_the_budget_and_those_that_decode_come_first(scheduler) -> None:
    wait(scheduler, 0, length=40)
    wait(scheduler, 1, length=24)
    assert step(scheduler) == [(0, 0, 24)]
    assert step(scheduler) == [(0, 24, 40), (1, 0, 8)]
    assert step(scheduler) == [(0, 40, 41), (1, 8, 24)]
    assert step(scheduler) == [(0, 41, 42), (1, 24, 25)]


def test_a_group_shares_full_blocks_and_owns_the_open_one(scheduler) -> None:
    wait(scheduler, 0, length=40, num_samples=3)
    step(scheduler)
    assert (samples(scheduler), scheduler.slots.num_free, scheduler.blocks.num_free) == ([(0, 0)], 1, 7)
    step(scheduler)
    assert samples(scheduler) == [(0, 0), (0, 1), (0, 2)]
    assert [scheduler.running.blocks(slot) for slot in range(3)] == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    for slot, free in enumerate((6, 7, 10)):
        scheduler.release(slot)
        assert scheduler.blocks.num_free == free
    assert scheduler.slots.num_free == 4


def test_blocks_come_as_a_sequence_grows(scheduler) -> None:
    wait(scheduler, 0, length=15)
    held = [10 - scheduler.blocks.num_free for _ in range(19) if step(scheduler)]
    assert held == [1] * 2 + [2] * 16 + [3]  # tokens 0 .. 14 and 15, then a block for each 16


def test_a_group_is_admitted_in_part_and_the_rest_stays_first(scheduler) -> None:
    wait(scheduler, 0, length=10, num_samples=6)
    wait(scheduler, 1, length=10)
    step(scheduler)
    assert samples(scheduler) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert waiting(scheduler) == [(0, [4, 5]), (1, [0])]
    scheduler.release(2)
    step(scheduler)
    assert waiting(scheduler) == [(0, [5]), (1, [0])]


def test_first_come_first_served_even_when_a_later_one_would_fit(scheduler) -> None:
    wait(scheduler, 0, length=100)
    wait(scheduler, 1, length=40)
    wait(scheduler, 2, length=1)
    for _ in range(5):
        step(scheduler)
    assert (samples(scheduler), waiting(scheduler)) == ([(0, 0)], [(1, [0]), (2, [0])])  # 3 blocks and one to spare


def test_the_youngest_gives_way_keeps_its_tokens_and_catches_up(scheduler) -> None:
    wait(scheduler, 0, length=70)
    wait(scheduler, 1, length=30)
    wait(scheduler, 2, length=14)
    while scheduler.blocks.num_free:
        step(scheduler)
    assert samples(scheduler) == [(0, 0), (1, 0), (2, 0)]
    while not scheduler.preemptions:
        step(scheduler)
    assert (samples(scheduler), waiting(scheduler)) == ([(0, 0), (1, 0)], [(2, [0])])
    stopped = scheduler.waiting[0].stopped
    count = len(stopped.records["tokens"])
    assert count > 20
    assert np.array_equal(stopped.records["tokens"][14:], np.full(count - 14, 7))
    scheduler.release(0)
    rows = step(scheduler)
    assert rows[-1] == (2, 0, min(count, 24))
    assert samples(scheduler) == [(1, 0), (2, 0)]


def test_a_group_without_a_token_waits_again_whole(scheduler) -> None:
    wait(scheduler, 0, length=15)
    wait(scheduler, 1, length=100, num_samples=2)
    step(scheduler)
    scheduler.preempt(1)
    assert (samples(scheduler), waiting(scheduler)) == ([(0, 0)], [(1, [0]), (1, [1])])
    assert (scheduler.slots.num_free, scheduler.blocks.num_free) == (3, 9)
    assert scheduler.leaders == set()


def test_followers_without_memory_wait_again(scheduler) -> None:
    wait(scheduler, 0, length=24, num_samples=3)
    assert scheduler.next_batch() is not None
    scheduler.blocks.take(scheduler.blocks.num_free - 1)
    scheduler.running.computed[0] = 24
    assert scheduler.fork(0) == [1]
    assert (waiting(scheduler), scheduler.slots.num_free) == ([(0, [2])], 2)


def test_dropping_gives_back_what_a_request_held_and_leaves_the_others(scheduler) -> None:
    wait(scheduler, 0, length=20, num_samples=2)
    wait(scheduler, 1, length=20)
    step(scheduler)
    wait(scheduler, 0, length=20)
    dropped = scheduler.drop(0)
    assert [(each.sample, len(each.token_ids)) for each in dropped] == [(0, 1), (1, 1), (0, 0)]
    assert (samples(scheduler), waiting(scheduler)) == ([(1, 0)], [])
    assert (scheduler.slots.num_free, scheduler.blocks.num_free) == (3, 8)
    assert scheduler.drop(0) == []
