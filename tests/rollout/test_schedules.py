"""Whatever the schedule, the engine's tokens and log-probs are the oracle's, bit for bit; memory is owned after every
step; every sample ends once. Arrivals, aborts, pauses, new weights, shared prompts, drafts, memory that runs out."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.names import export_tensors
from policy.transformer import Policy
from rollout.engine import Engine
from rollout.request import Completion, Request
from tests.rollout.tiny import (
    EOS,
    VOCAB,
    assert_equals_versions,
    assert_idle,
    assert_memory_is_owned,
    make_engine,
    make_policy,
    make_request,
    text_of,
)

CHUNK_EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 70]
STREAMS = [np.random.default_rng(0).integers(1, VOCAB, 96), np.tile(np.random.default_rng(1).integers(1, VOCAB, 5), 20)]


@dataclass
class Plan:
    """What happens before which step."""

    requests: list[Request]
    submit: list[int]
    abort: dict[int, int] = field(default_factory=dict)  # step of a request
    weights: list[int] = field(default_factory=list)  # steps before which a new version arrives
    pause: int | None = None  # before this step, until two further ones have done nothing


@st.composite
def prompts(draw: st.DrawFn) -> np.ndarray:
    """The beginning of one of two streams, perhaps with an end of its own: prompts share beginnings."""
    stream = STREAMS[draw(st.integers(0, 1))][: draw(st.sampled_from(CHUNK_EDGES) | st.integers(1, 70))]
    tail = np.random.default_rng(draw(st.integers(0, 1))).integers(1, VOCAB, draw(st.sampled_from([0, 0, 1, 9, 20])))
    return np.concatenate([stream, tail])[:72]


@st.composite
def requests(draw: st.DrawFn, request_id: int) -> Request:
    num_samples, max_new_tokens = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 9, 40]))
    return make_request(
        request_id,
        draw(st.integers(0, 2)),
        num_samples,
        max_new_tokens,
        seed=draw(st.sampled_from([0, 2**64 - 1])),
        full_vocab_samples=draw(st.sampled_from([(), (), (0, num_samples - 1)])),
        prompt_ids=draw(prompts()),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.3])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.8])),
        top_k=draw(st.sampled_from([0, 0, 5])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.2])),
        min_new_tokens=min(max_new_tokens, draw(st.sampled_from([0, 0, 0, 1, 12]))),
        stop_token_ids=draw(st.sampled_from([(), (), (3, 17), (EOS,)])),
        stop_strings=draw(st.sampled_from([(), (), ("abc",), ("é", "dd", "bfa")])),
        top_log_probs=draw(st.sampled_from([0, 0, 0, 3])),
        processed_log_probs=draw(st.booleans()),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    count = draw(st.integers(1, 4))
    asked = [draw(requests(request_id)) for request_id in range(count)]
    submit = [draw(st.integers(0, 8)) for _ in range(count)]
    abort = {r: draw(st.integers(0, 20)) for r in range(count) if draw(st.integers(0, 3)) == 0}
    weights = draw(st.lists(st.integers(0, 25), max_size=2, unique=True))
    return Plan(asked, submit, abort, sorted(weights), draw(st.none() | st.integers(0, 12)))


def play(engine: Engine, plan: Plan, policies: list[Policy]) -> list[Completion]:
    completions: list[Completion] = []
    last, step, version = max(plan.submit + plan.weights), 0, 0
    while step <= last or engine.has_work:
        for request, at in zip(plan.requests, plan.submit, strict=True):
            if at == step:
                engine.submit(request)
        for request_id, at in plan.abort.items():
            if at == step:
                engine.abort(request_id)
        if step in plan.weights:
            version += 1
            engine.load_weights(export_tensors(policies[version]), version)
        if step == plan.pause:
            completions += sit_out_a_pause(engine)
        assert_memory_is_owned(engine)
        completions += engine.step()
        assert_memory_is_owned(engine)
        step += 1
    return completions


def sit_out_a_pause(engine: Engine) -> list[Completion]:
    engine.pause()
    aborted = engine.step()
    assert all(completion.finish_reason == "abort" for completion in aborted)
    before = engine.running.length.copy()
    assert engine.step() == []
    assert np.array_equal(engine.running.length, before)
    engine.resume()
    return aborted


def check(group: int, dtype: torch.dtype, plan: Plan, **config: object) -> Engine:
    policies = [make_policy(group, dtype, seed) for seed in range(3)]
    engine = make_engine(policies[0], decode=text_of, **config)
    completions = play(engine, plan, policies)
    assert_idle(engine)
    samples = [(request.request_id, sample) for request in plan.requests for sample in range(request.num_samples)]
    assert sorted((c.request_id, c.sample) for c in completions) == samples
    for completion in completions:
        assert np.all(np.diff(completion.policy_versions) >= 0)
        assert_equals_versions(dict(enumerate(policies)), plan.requests[completion.request_id], completion)
    return engine


CONFIGS = st.fixed_dictionaries(
    {
        "max_batch": st.integers(1, 12),
        "prefill_tokens": st.sampled_from([16, 17, 200]) | st.integers(16, 200),
        "blocks": st.sampled_from([7, 9, 14, 60]),  # the longest sequence takes 7
        "prefix_cache": st.sampled_from([True, True, False]),
        "speculative_tokens": st.sampled_from([0, 1, 4]),
    }
)
POLICIES = st.sampled_from([1, 2, 3]), st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=20)
@given(*POLICIES, plans(), CONFIGS)
def test_any_schedule(group: int, dtype: torch.dtype, plan: Plan, config: dict) -> None:
    check(group, dtype, plan, **config)


@pytest.mark.slow
@settings(max_examples=400)
@given(*POLICIES, plans(), CONFIGS)
def test_many_schedules(group: int, dtype: torch.dtype, plan: Plan, config: dict) -> None:
    check(group, dtype, plan, **config)


@pytest.mark.parametrize("group", [1, 2])
def test_everything_at_once_happens(group: int) -> None:
    """A schedule in which nothing is idle: else the properties above could hold of an engine that never does it."""
    stream = STREAMS[1]
    asked = [
        make_request(i, 1, 3, 40, prompt_ids=stream[: 33 + 8 * (i % 2)], temperature=0.3, min_new_tokens=20)
        for i in range(5)
    ]
    plan = Plan(asked, submit=[0, 3, 3, 6, 9], weights=[10, 14], pause=12)
    engine = check(group, torch.float32, plan, max_batch=5, prefill_tokens=40, blocks=8, speculative_tokens=3)
    assert engine.scheduler.preemptions > 0
    assert engine.accepted_tokens > 0
    assert engine.cache is not None
    assert engine.cache.hit_tokens > 0
