"""What prompts share is computed once, and read only where it is what a whole forward gives."""

import numpy as np
import pytest
import torch

from policy.names import export_tensors
from policy.transformer import Policy
from rollout.engine import Engine
from rollout.memory import BlockPool
from rollout.prefix_cache import PrefixCache
from rollout.request import Request
from tests.rollout.tiny import CHUNK, assert_equals_oracle, assert_memory_is_owned, make_engine, make_policy, run
from tests.rollout.tiny import make_request as make

STREAM = np.random.default_rng(5).integers(1, 40, 120)


@pytest.fixture(params=[1, 2], ids=["softmax", "hybrid"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return make_policy(request.param, torch.bfloat16)


def asks(request_id: int, length: int, tail: int = 0, num_samples: int = 1) -> Request:
    """The beginning of the stream, then `tail` tokens of its own."""
    own = np.random.default_rng(request_id).integers(1, 40, tail)
    return make(request_id, 3, num_samples, 6, prompt_ids=np.concatenate([STREAM[:length], own]))


def computed(engine: Engine, request: Request) -> int:
    """Prompt tokens that it computes, having answered what the oracle does."""
    before = engine.cache.seen_tokens - engine.cache.hit_tokens
    for completion in engine.generate([request]):
        assert_equals_oracle(POLICIES[id(engine)], request, completion)
    assert_memory_is_owned(engine)
    return engine.cache.seen_tokens - engine.cache.hit_tokens - before


POLICIES: dict[int, Policy] = {}


@pytest.fixture
def engine(policy: Policy) -> Engine:
    engine = make_engine(policy, max_batch=4)
    POLICIES[id(engine)] = policy
    return engine


@pytest.mark.parametrize(("length", "again"), [(15, 15), (16, 16), (17, 1), (31, 15), (32, 16), (33, 1), (70, 6)])
def test_a_prompt_asked_again_computes_its_last_tokens_only(engine, length, again) -> None:
    """One token at least, because the next is drawn from its hidden state; 32 leave 16, as no chunk is halved."""
    assert computed(engine, asks(0, length)) == length
    assert computed(engine, asks(1, length)) == again
    assert computed(engine, asks(2, length)) == again


def test_the_place_where_prompts_part_is_kept_from_the_second_on(engine, policy) -> None:
    """Softmax layers go on from any full chunk. A state is only where one was kept: the second prompt leaves it."""
    hybrid = bool(engine.budget.snapshots)
    assert computed(engine, asks(0, 50, tail=20)) == 70
    assert computed(engine, asks(1, 50, tail=30)) == (80 if hybrid else 32)
    assert computed(engine, asks(2, 50, tail=25)) == 27
    assert computed(engine, asks(3, 48)) == 16 if not hybrid else 48


def test_a_group_in_parts_computes_its_prompt_once(engine) -> None:
    """Four samples start together; the others in up to seven parts, each of which computes what the cache has not."""
    parts, rest = divmod(computed(engine, asks(0, 70, num_samples=11)) - 70, 6)
    assert (1 <= parts <= 7, rest) == (True, 0)


def test_nothing_of_older_weights_is_read(policy) -> None:
    other = make_policy(policy.config.layer_group_size, torch.bfloat16, seed=1)
    engine = make_engine(policy, max_batch=4)
    engine.generate([asks(0, 70)])
    engine.load_weights(export_tensors(other), 1)
    POLICIES[id(engine)] = other
    assert computed(engine, asks(1, 70)) == 70
    assert computed(engine, asks(2, 70)) == 6


@pytest.mark.parametrize("mode", ["continue", "reprefill"])
def test_a_prompt_computed_under_two_versions_is_not_kept(policy, mode) -> None:
    """The weights arrive between two pieces of a prompt; who comes later must not go on from it."""
    other = make_policy(policy.config.layer_group_size, torch.bfloat16, seed=1)
    engine = make_engine(policy, max_batch=4, prefill_tokens=16, on_new_weights=mode)
    engine.submit(asks(0, 70))
    engine.step()
    engine.load_weights(export_tensors(other), 1)
    run(engine)
    POLICIES[id(engine)] = other
    assert computed(engine, asks(1, 70)) == (70 if mode == "continue" else 6)


def test_prefixes_give_way_to_sequences_and_states_to_newer_ones(policy) -> None:
    """Nine blocks and two states; five prompts of two to four blocks, each asked twice."""
    engine = make_engine(policy, max_batch=2, blocks=9)
    for request_id in range(10):
        prompt = np.random.default_rng(request_id % 5).integers(1, 40, 20 + 9 * (request_id % 5))
        request = make(request_id, 1, 2, 3, prompt_ids=prompt)
        engine.submit(request)
        for completion in run(engine):
            assert_equals_oracle(policy, request, completion)
    assert len(engine.blocks.cached) < 9  # the full chunks of all five


def test_it_can_be_turned_off(policy) -> None:
    engine = make_engine(policy, max_batch=4, prefix_cache=False)
    assert engine.cache is None
    assert (engine.describe()["snapshots"], engine.describe()["prefix_hit_rate"]) == (0, 0.0)
    first, again = engine.generate([asks(0, 70)]), engine.generate([asks(0, 70)])
    assert np.array_equal(first[0].log_probs, again[0].log_probs)


def cache_of(blocks: int, snapshots: int | None) -> tuple[PrefixCache, BlockPool]:
    pool = BlockPool(blocks)
    return PrefixCache(pool, snapshots, CHUNK), pool


def test_the_version_is_part_of_what_a_chunk_is_known_by() -> None:
    cache, pool = cache_of(4, None)
    cache.insert(STREAM[:32], np.array(pool.take(2)), policy_version=3)
    assert cache.match(STREAM[:40], 3).blocks == [0, 1]
    assert cache.match(STREAM[:40], 4).blocks == []


def test_equal_tokens_behind_another_beginning_are_another_chunk() -> None:
    cache, pool = cache_of(4, None)
    ids = np.concatenate([STREAM[:16], STREAM[32:48]])
    cache.insert(STREAM[:48], np.array(pool.take(3)), 0)
    assert cache.match(np.append(ids, 1), 0).blocks == [0]


def test_a_match_ends_at_a_state_and_tells_how_much_is_known() -> None:
    cache, pool = cache_of(5, 1)
    assert cache.insert(STREAM[:16], np.array(pool.take(1)), 0) == 0
    assert cache.insert(STREAM[:16], np.array([0]), 0) is None  # it has one
    assert cache.insert(STREAM[:48], np.array([0, *pool.take(2)]), 0) == 0  # the only one, taken from the older
    match = cache.match(STREAM[:33], 0)
    assert (match.blocks, match.snapshot, match.shared) == ([], None, 32)
    match = cache.match(STREAM[:60], 0)
    assert (match.blocks, match.snapshot, match.shared) == ([0, 1, 2], 0, 48)


def test_a_block_taken_again_takes_its_chunk_and_state_out() -> None:
    cache, pool = cache_of(2, 2)
    blocks = pool.take(2)
    cache.insert(STREAM[:32], np.array(blocks), 0)
    pool.give_back(blocks)
    pool.take(1)  # the end of the prefix first
    match = cache.match(STREAM[:40], 0)
    assert (match.shared, match.blocks) == (16, [])
    assert len(cache._free_snapshots) == 2
