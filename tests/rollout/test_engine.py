"""What the engine promises besides the bits: every sample once, in order, of the right length, whatever the memory."""

import numpy as np
import pytest
import torch

from policy.transformer import Policy
from tests.rollout.tiny import (
    EOS,
    assert_equals_oracle,
    assert_idle,
    assert_same,
    expected,
    make_engine,
    make_policy,
    make_request,
    run,
    samples_of,
)


@pytest.fixture
def policy() -> Policy:
    return make_policy(2, torch.bfloat16)


def test_completions_come_by_request_and_then_by_sample(policy) -> None:
    requests = [make_request(7, 40, 3), make_request(2, 3, 2, max_new_tokens=2), make_request(5, 16, 1)]
    completions = make_engine(policy, max_batch=3).generate(requests)
    assert samples_of(completions) == [(7, 0), (7, 1), (7, 2), (2, 0), (2, 1), (5, 0)]
    for completion in completions:
        assert (completion.token_ids.dtype, completion.log_probs.dtype) == (np.int64, np.float32)


def test_nothing_to_do(policy) -> None:
    engine = make_engine(policy, max_batch=2)
    assert engine.generate([]) == []
    assert engine.step() == []
    assert_idle(engine)


def test_a_limit_of_one_token_is_one_token(policy) -> None:
    """Also beside a longer sample, whose arrays would have room for a second token."""
    engine = make_engine(policy, max_batch=8)
    requests = [make_request(0, 5, 3, max_new_tokens=1), make_request(1, 5, 2, max_new_tokens=20)]
    completions = engine.generate(requests)
    assert [len(completion.token_ids) for completion in completions[:3]] == [1, 1, 1]


def test_the_end_of_text_ends_a_sample_and_is_its_last_token() -> None:
    """As the first token, later, at the limit, or not at all."""
    completions = make_engine(make_policy(3), max_batch=16).generate([make_request(0, 9, 48, 5)])
    for completion in completions:
        stops = completion.token_ids == EOS
        assert not stops[:-1].any()
        assert stops[-1] == (completion.finish_reason == "stop")
        assert stops[-1] or len(completion.token_ids) == 5
    lengths = {(len(completion.token_ids), completion.finish_reason) for completion in completions}
    assert lengths >= {(1, "stop"), (3, "stop"), (5, "stop"), (5, "length")}


def test_more_samples_than_the_batch_holds(policy) -> None:
    engine = make_engine(policy, max_batch=4)
    request = make_request(0, 18, 11, full_vocab_samples=(0, 10))
    engine.submit(request)
    completions = run(engine)
    assert sorted(samples_of(completions)) == [(0, sample) for sample in range(11)]
    for completion in completions:
        assert_equals_oracle(policy, request, completion)


def test_memory_runs_out_and_all_end() -> None:
    """32 blocks, and up to 24 for each request: sequences lose their cache, and none a token."""
    policy = make_policy(2, torch.float32, stops=False)
    engine = make_engine(policy, max_batch=16, memory_mb=1)
    assert engine.budget.blocks == 32
    requests = [make_request(request_id, 48 + request_id, 5, max_new_tokens=64) for request_id in range(3)]
    for request in requests:
        engine.submit(request)
    completions = run(engine)
    assert engine.scheduler.preemptions > 3
    assert sorted(samples_of(completions)) == [(r, s) for r in range(3) for s in range(5)]
    for completion in completions:
        assert_equals_oracle(policy, requests[completion.request_id], completion)


def test_a_long_prompt_does_not_stop_those_that_run(policy) -> None:
    engine = make_engine(policy, max_batch=4, prefill_tokens=16)
    engine.submit(make_request(0, 10, 1, 40, temperature=0.7))
    engine.step()
    before = int(engine.running.length[0])
    engine.submit(make_request(1, 70, 2))
    for _ in range(3):
        engine.step()
    assert engine.running.computed[1] == 48
    assert engine.running.length[0] == before + 3


def test_the_engine_describes_itself(policy) -> None:
    engine = make_engine(policy, policy_version=2, max_batch=16, memory_mb=1)
    completions = engine.generate([make_request(0, 8, 3)])
    engine.submit(make_request(1, 8, 1, 40))
    engine.step()
    engine.abort(1)
    completions += engine.step()
    description = engine.describe()
    assert description.pop("seconds") > 0
    assert description == {
        "engine": "local",
        "policy_version": 2,
        "dtype": "bfloat16",
        "max_batch": 16,
        "blocks": 80,
        "snapshots": 16,
        "slot_bytes": 16 * 16 * 1024,  # 8 heads x 16 x 16 x (4 + 2 x 2) bytes
        "block_bytes": 80 * 8 * 1024,  # 2 layers x 2 x 4 heads x 16 x 16 x 2 bytes
        "snapshot_bytes": 16 * 8 * 1024,  # 8 heads x 16 x 16 floats
        "block_tokens": 16,
        "running": 0,
        "waiting": 0,
        "tokens": sum(len(completion.token_ids) for completion in completions),
        "preemptions": 0,
        "prefix_hit_rate": 0.0,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
        "acceptance_rate": 0.0,
    }


def test_greedy_is_the_most_likely_token(policy) -> None:
    request = make_request(0, 12, 1, 10, temperature=0.0, full_vocab_samples=(0,))
    (completion,) = make_engine(policy, max_batch=1).generate([request])
    assert np.array_equal(completion.token_ids, completion.full_log_probs.argmax(-1))
    assert np.array_equal(completion.log_probs, completion.full_log_probs.max(-1))


def test_truncation_changes_the_draw_and_not_the_record(policy) -> None:
    """top_k 1 draws what greedy draws, and its log-probs are still those of the whole distribution."""
    narrow, greedy = make_request(0, 12, 1, 10, top_k=1), make_request(0, 12, 1, 10, temperature=0.0)
    assert_same([expected(policy, narrow, 0)], [expected(policy, greedy, 0)])
    assert_same(make_engine(policy, max_batch=1).generate([narrow]), [expected(policy, greedy, 0)])
