"""Aborting requests, changing weights, and what is refused: all a caller does to an engine besides asking."""

import numpy as np
import pytest
import torch

from policy.names import export_tensors
from policy.transformer import Policy
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Request, SamplingParams
from tests.rollout.tiny import (
    assert_equals_oracle,
    assert_idle,
    assert_memory_is_owned,
    assert_same,
    make_engine,
    make_policy,
    make_request,
    run,
    samples_of,
)


@pytest.fixture
def policy() -> Policy:
    return make_policy(2, torch.bfloat16)


@pytest.fixture
def busy(policy) -> Engine:
    """Two slots: request 0 runs in one, 1 is in the middle of its prompt in the other, 2 waits."""
    engine = make_engine(policy, max_batch=2, prefill_tokens=16)
    engine.submit(make_request(0, 10, 1, 40, temperature=0.7, full_vocab_samples=(0,)))
    engine.step()
    for request_id, length in ((1, 70), (2, 33)):
        engine.submit(make_request(request_id, length, 1))
    engine.step()
    assert engine.running.active.sum() == 2
    assert (engine.running.computed[1], len(engine.scheduler.waiting)) == (16, 1)
    return engine


def test_an_aborted_running_request_keeps_what_it_has(busy, policy) -> None:
    busy.abort(0)
    assert_memory_is_owned(busy)
    (completion,) = busy.step()
    assert completion.finish_reason == "abort"
    assert (len(completion.token_ids), completion.full_log_probs.shape) == (2, (2, 40))
    assert_equals_oracle(policy, make_request(0, 10, 1, 40, temperature=0.7, full_vocab_samples=(0,)), completion)
    assert_memory_is_owned(busy)
    assert sorted(samples_of(run(busy))) == [(1, 0), (2, 0)]


@pytest.mark.parametrize("request_id", [1, 2])
def test_an_aborted_request_without_a_token_comes_back_empty(busy, request_id) -> None:
    busy.abort(request_id)
    (completion,) = busy.step()
    assert (completion.request_id, completion.sample, completion.finish_reason) == (request_id, 0, "abort")
    assert len(completion.token_ids) == 0
    assert_memory_is_owned(busy)
    assert sorted(samples_of(run(busy))) == [(r, 0) for r in range(3) if r != request_id]


def test_an_abort_does_not_disturb_the_others(busy, policy) -> None:
    busy.abort(1)
    assert samples_of(busy.step()) == [(1, 0)]
    requests = {0: make_request(0, 10, 1, 40, temperature=0.7, full_vocab_samples=(0,)), 2: make_request(2, 33, 1)}
    for completion in run(busy):
        assert_equals_oracle(policy, requests[completion.request_id], completion)


def test_aborting_an_unknown_request_does_nothing(busy) -> None:
    busy.abort(99)
    assert sorted(samples_of(run(busy))) == [(0, 0), (1, 0), (2, 0)]


def test_an_aborted_request_split_over_batches_ends_whole(policy) -> None:
    engine = make_engine(policy, max_batch=2)
    engine.submit(make_request(0, 10, 5, 40, temperature=0.7))
    ended = engine.step()
    engine.abort(0)
    assert sorted(samples_of(ended + run(engine))) == [(0, sample) for sample in range(5)]


def test_weights_change_the_answers_to_those_of_a_fresh_engine(policy) -> None:
    other = make_policy(2, torch.bfloat16, seed=1)
    requests = [make_request(0, 20, 4), make_request(1, 3, 4)]
    engine = make_engine(policy, max_batch=8)
    before = engine.generate(requests)
    engine.load_weights(export_tensors(other), 5)
    after = engine.generate(requests)
    assert_same(after, make_engine(other, max_batch=8).generate(requests))
    assert not np.array_equal(before[0].log_probs[:1], after[0].log_probs[:1])
    assert {version for completion in before for version in completion.policy_versions} == {0}
    assert {version for completion in after for version in completion.policy_versions} == {5}


def test_weights_that_do_not_fit_leave_everything_as_it_was(policy) -> None:
    engine = make_engine(policy, policy_version=3, max_batch=2)
    want = engine.generate([make_request(0, 8, 2)])
    tensors = export_tensors(make_policy(2, torch.bfloat16, seed=1))
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing lm_head.weight"):
        engine.load_weights(tensors, 4)
    assert engine.policy_version == 3
    assert_same(engine.generate([make_request(0, 8, 2)]), want)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            make_request(4, 100, 1, 29),
            r"request 4: prompt 100 \+ max_new_tokens 29 exceeds the policy's 128 positions",
        ),
        (
            Request(5, np.array([1, 40]), 1, SamplingParams(4), seed=0),
            r"request 5: prompt token ids from 1 to 40, the policy has 0 to 39; encode .* policy's own tokenizer",
        ),
        (
            Request(6, np.array([-1, 3]), 1, SamplingParams(4), seed=0),
            r"request 6: prompt token ids from -1 to 3, the policy has 0 to 39",
        ),
        (
            Request(8, np.array([1]), 1, SamplingParams(4, stop_strings=("a",)), seed=0),
            r"request 8: stop_strings need an engine with `decode`; give it one, or use stop_token_ids",
        ),
        (
            Request(9, np.array([1]), 1, SamplingParams(4, stop_token_ids=(40,)), seed=0),
            r"request 9: stop_token_ids \(40,\), the policy has 0 to 39",
        ),
        (
            Request(10, np.array([1]), 1, SamplingParams(4, top_log_probs=41), seed=0),
            r"request 10: top_log_probs 41, the policy has 40 tokens",
        ),
    ],
)
def test_requests_that_could_never_run_are_refused_at_submission(policy, request_, message) -> None:
    engine = make_engine(policy, max_batch=16, memory_mb=1)
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    with pytest.raises(ValueError, match=message):
        engine.generate([make_request(0, 4), request_])
    assert_idle(engine)


def test_the_largest_request_that_fits_runs_and_a_larger_one_is_refused() -> None:
    """A token that is not computed needs no memory: 113 of 7 blocks' 112."""
    policy = make_policy(2, torch.float32, stops=False)
    engine = make_engine(policy, max_batch=7, blocks=7)
    with pytest.raises(ValueError, match=r"request 0: a sample needs 8 blocks .* the engine has 7; raise rollout.mem"):
        engine.submit(make_request(0, 8, 3, 106))
    request = make_request(0, 8, 3, 105)
    engine.submit(request)
    completions = run(engine)
    assert engine.scheduler.preemptions >= 2
    for completion in completions:
        assert_equals_oracle(policy, request, completion)


def test_generate_is_refused_while_others_run(policy) -> None:
    engine = make_engine(policy, max_batch=2)
    engine.submit(make_request(0, 4))
    with pytest.raises(ValueError, match=r"generate\(\) while earlier requests run; step\(\)"):
        engine.generate([make_request(1, 4)])
    assert samples_of(run(engine)) == [(0, 0)]


def test_two_requests_with_one_id_are_refused(policy) -> None:
    engine = make_engine(policy, max_batch=2)
    with pytest.raises(ValueError, match="request 1: another unanswered one has that id"):
        engine.generate([make_request(1, 4), make_request(1, 5)])
    assert_idle(engine)
    engine.submit(make_request(1, 4))
    with pytest.raises(ValueError, match="request 1: another unanswered one has that id"):
        engine.submit(make_request(1, 5))
    assert samples_of(run(engine)) == [(1, 0)]
    assert samples_of(engine.generate([make_request(1, 4)])) == [(1, 0)]


def test_too_little_memory_for_the_batch_is_refused(policy) -> None:
    """A slot has 8 x 16 x 16 x (4 + 2 x 2) bytes, 16 KiB; a block 2 x 2 x 4 x 16 x 16 x 2, 8 KiB: 100 need 2.3 MiB."""
    with pytest.raises(
        ValueError, match=r"rollout.memory_mb = 2: 100 sequences need at least 3 MiB .* lower rollout.max"
    ):
        Engine(policy, RolloutConfig(max_batch=100, memory_mb=2))
    engine = Engine(policy, RolloutConfig(max_batch=100, memory_mb=3))
    assert (engine.budget.blocks, engine.budget.snapshots) == (138, 46)  # 184 less as many as a quarter holds snapshots
