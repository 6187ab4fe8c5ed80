"""Pause, resume, abort, peek and new weights, between steps and from other threads."""

import threading

import numpy as np
import pytest
import torch

import ops
from policy.cache import CachePools, CacheView
from policy.names import export_tensors
from policy.transformer import Policy
from rollout.engine import Engine
from rollout.request import Completion, Request
from tests.rollout.tiny import (
    assert_equals_oracle,
    assert_equals_versions,
    assert_idle,
    assert_same,
    make_engine,
    make_policy,
    make_request,
    run,
)

PATIENCE = 60.0


@pytest.fixture
def policies() -> list[Policy]:
    return [make_policy(2, torch.bfloat16, seed, stops=False) for seed in range(3)]


def test_a_paused_engine_computes_nothing_and_goes_on_as_if_nothing_had_been(policies) -> None:
    engine, request = make_engine(policies[0], max_batch=2), make_request(0, 20, 2, 12)
    engine.submit(request)
    engine.step()
    engine.pause()
    assert engine.is_paused
    before = engine.running.length.copy()
    assert [engine.step() for _ in range(3)] == [[], [], []]
    assert np.array_equal(engine.running.length, before)
    engine.resume()
    for completion in run(engine):
        assert_equals_oracle(policies[0], request, completion)


def test_an_abort_while_paused_is_answered(policies) -> None:
    engine = make_engine(policies[0], max_batch=2)
    engine.submit(make_request(0, 20, 1, 12))
    engine.step()
    engine.pause()
    engine.abort(0)
    assert engine.has_work
    (completion,) = engine.step()
    assert (completion.finish_reason, len(completion.token_ids)) == ("abort", 1)
    assert_idle(engine)


def test_peek_gives_what_is_new_and_never_more_than_the_end(policies) -> None:
    engine = make_engine(policies[0], max_batch=2, blocks=7)
    request = make_request(0, 30, 3, 40, top_log_probs=2, full_vocab_samples=(1,))
    engine.submit(request)
    engine.submit(make_request(1, 30, 1, 40))
    seen: dict[int, list[Completion]] = {sample: [] for sample in range(3)}
    ended: list[Completion] = []
    while engine.has_work:
        ended += engine.step()
        known = [sum(len(part.token_ids) for part in seen[sample]) for sample in range(3)]
        for part in engine.peek(0, known[:2]) if not known[2] else engine.peek(0, known):
            assert (part.finish_reason, part.request_id, len(part.token_ids) > 0) == ("running", 0, True)
            seen[part.sample].append(part)
    assert engine.peek(0) == engine.peek(7) == []
    assert engine.scheduler.preemptions > 0
    for completion in ended:
        if completion.request_id == 0:
            for name in ("token_ids", "log_probs", "policy_versions", "top_token_ids", "top_log_probs"):
                parts = np.concatenate([getattr(part, name) for part in seen[completion.sample]])
                assert np.array_equal(parts, getattr(completion, name)[: len(parts)])
            assert len(parts) == len(completion.token_ids) - 1  # the last came with the end


def test_weights_that_arrive_between_steps_are_those_of_every_later_token(policies) -> None:
    """Computed again under the new ones: as a whole forward of its own version has each token."""
    engine = make_engine(policies[0], max_batch=3, prefill_tokens=64)
    requests = [make_request(0, 20, 2, 20), make_request(1, 40, 2, 20), make_request(2, 70, 1, 20)]
    for request in requests:
        engine.submit(request)
    completions: list[Completion] = []
    for version in (0, 1, 2):
        if version:
            engine.load_weights(export_tensors(policies[version]), version)
            assert not engine.running.active.any()
        for _ in range(7):
            completions += engine.step()
    completions += run(engine)
    assert {tuple(np.unique(c.policy_versions).tolist()) for c in completions} >= {(0, 1, 2), (2,)}
    for completion in completions:
        assert_equals_versions(dict(enumerate(policies)), requests[completion.request_id], completion)


def went_on(policies: list[Policy], request: Request, computed: list[int], count: int) -> tuple[list, list]:
    """One sequence alone, token by token through a cache that is kept: the first computed[0] tokens under version 0,
    those before computed[1] under 1, and so on. Tokens and log-probs."""
    config = policies[0].config
    pools = CachePools(config, 1, 8, policies[0].dtype, torch.device("cpu"))
    table, ids, log_probs = torch.arange(8)[None], request.prompt_ids.tolist(), []
    for position in range(len(ids) + count - 1):
        version = sum(position >= end for end in computed)
        layout = ops.ChunkLayout.build([1], config.chunk_size, [position])
        with torch.no_grad():
            hidden = policies[version](
                torch.tensor(ids[position : position + 1]), layout, CacheView(pools, torch.tensor([0]), table)
            )
        if position == len(ids) - 1:
            address = np.array([[position + 1], [0], [request.prompt], [request.step]], dtype=np.uint32)
            one, zero = torch.ones(1), torch.zeros(1)
            uniform = ops.addressed_uniform(request.seed, address)
            token, log_prob, *_ = ops.sample(
                hidden, policies[version].lm_head, one, one, zero.long(), zero, uniform, policies[version].dtype
            )
            ids.append(int(token))
            log_probs.append(float(log_prob))
    return ids[len(request.prompt_ids) :], log_probs


@pytest.mark.parametrize("length", [5, 15, 16, 40])
def test_a_sequence_can_go_on_from_what_older_weights_cached(policies, length) -> None:
    """Also where they arrive between two pieces of a prompt."""
    engine = make_engine(policies[0], max_batch=2, prefill_tokens=16, on_new_weights="continue")
    request, computed = make_request(0, length, 1, 30), []
    engine.submit(request)
    for version, steps in ((1, 2), (2, 9)):
        for _ in range(steps):
            engine.step()
        computed.append(int(engine.running.computed[0]))
        engine.load_weights(export_tensors(policies[version]), version)
        assert engine.running.computed[0] == computed[-1]
    (completion,) = run(engine)
    tokens, log_probs = went_on(policies, request, computed, 30)
    assert completion.token_ids.tolist() == tokens
    assert np.array_equal(completion.log_probs, np.array(log_probs, dtype=np.float32))
    versions = np.array([sum(position - 1 >= end for end in computed) for position in range(length, length + 30)])
    assert np.array_equal(completion.policy_versions, versions)


def test_the_digest_is_that_of_the_weights(policies) -> None:
    engine, same = (make_engine(policies[0], max_batch=2) for _ in range(2))
    before = engine.weights_digest()
    assert before == same.weights_digest()
    engine.load_weights(export_tensors(policies[1]), 1)
    assert engine.weights_digest() != before
    engine.load_weights(export_tensors(policies[0]), 2)
    assert engine.weights_digest() == before


class Generating(threading.Thread):
    """Runs `generate`, and tells when the first tokens are there."""

    def __init__(self, engine: Engine, requests: list[Request]) -> None:
        super().__init__(daemon=True)
        self.engine, self.requests = engine, requests
        self.completions: list[Completion] = []
        self.start()
        while not engine.running.active.any():
            threading.Event().wait(0.001)

    def run(self) -> None:
        self.completions = self.engine.generate(self.requests)

    def answer(self) -> list[Completion]:
        self.join(PATIENCE)
        assert not self.is_alive()
        return self.completions


def test_other_threads_pause_and_resume_what_generates(policies) -> None:
    engine, request = make_engine(policies[0], max_batch=4), make_request(0, 8, 2, 50)
    generating = Generating(engine, [request])
    for _ in range(5):
        engine.pause()
        before = engine.running.length.copy()
        generating.join(0.02)
        assert np.array_equal(engine.running.length, before)
        engine.resume()
    for completion in generating.answer():
        assert_equals_oracle(policies[0], request, completion)


def test_other_threads_abort_and_bring_weights_while_generate_is_paused(policies) -> None:
    engine = make_engine(policies[0], max_batch=4)
    requests = [make_request(0, 8, 2, 60), make_request(1, 9, 1, 60)]
    generating = Generating(engine, requests)
    engine.pause()
    assert [part.sample for part in engine.peek(0)] in ([], [0, 1])
    engine.abort(1)
    engine.load_weights(export_tensors(policies[1]), 1)
    engine.resume()
    completions = generating.answer()
    assert [(c.request_id, c.sample, c.finish_reason) for c in completions] == [
        (0, 0, "length"),
        (0, 1, "length"),
        (1, 0, "abort"),
    ]
    for completion in completions:
        assert_equals_versions(dict(enumerate(policies)), requests[completion.request_id], completion)
    assert completions[0].policy_versions[-1] == 1


def test_new_weights_that_do_not_fit_change_nothing_that_runs(policies) -> None:
    engine, request = make_engine(policies[0], max_batch=2), make_request(0, 20, 2, 12)
    engine.submit(request)
    engine.step()
    tensors = export_tensors(policies[1])
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing lm_head.weight"):
        engine.load_weights(tensors, 1)
    assert_same(run(engine), make_engine(policies[0], max_batch=2).generate([request]))
