"""The engine and the trainer are one function: equal tokens, equal bits, whatever the schedule (design A1 - A8)."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from rollout.engine import Engine
from rollout.request import Completion, Request
from tests.rollout.tiny import (
    CHUNK,
    assert_equals_oracle,
    assert_idle,
    assert_memory_is_owned,
    expected,
    make_engine,
    make_policy,
    make_request,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
CHUNK_EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 70]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Arrival(NamedTuple):
    request: Request
    submit_at: int
    abort_at: int | None


@st.composite
def plans(draw: st.DrawFn) -> list[Arrival]:
    """Up to four requests with their own sampling, each submitted and perhaps aborted at some step."""
    return [_arrival(draw, request_id) for request_id in range(draw(st.integers(1, 4)))]


def _arrival(draw: st.DrawFn, request_id: int) -> Arrival:
    num_samples = draw(st.integers(1, 5))
    request = make_request(
        request_id,
        length=draw(st.sampled_from(CHUNK_EDGES) | st.integers(1, 70)),
        num_samples=num_samples,
        max_new_tokens=draw(st.sampled_from([1, 2, 9, 40])),
        seed=draw(st.sampled_from([0, 2**64 - 1])),
        full_vocab_samples=draw(st.sampled_from([(), (0, num_samples - 1)])),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.0, 1.3])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        top_k=draw(st.sampled_from([0, 5])),
    )
    return Arrival(request, draw(st.integers(0, 5)), draw(st.sampled_from([None, None, 0, 1, 2, 4, 7, 12])))


def play(engine: Engine, plan: list[Arrival]) -> list[Completion]:
    """Submits and aborts when the plan says so, and checks the memory after every step."""
    completions: list[Completion] = []
    last, step = max(arrival.submit_at for arrival in plan), 0
    while step <= last or engine.has_work:
        for request, submit_at, abort_at in plan:
            if submit_at == step:
                engine.submit(request)
            if abort_at == step:
                engine.abort(request.request_id)
        completions += engine.step()
        assert_memory_is_owned(engine)
        step += 1
    return completions


@DTYPES
@pytest.mark.parametrize("group", [2, 3])
@settings(max_examples=20)
@given(
    plan=plans(),
    max_batch=st.integers(1, 20),
    prefill_tokens=st.sampled_from([16, 17, 200]) | st.integers(16, 200),
)
def test_engine_equals_the_training_forward(dtype, group, plan, max_batch, prefill_tokens) -> None:
    policy = make_policy(group, dtype)
    # One MiB holds few blocks of the policy with two softmax layers, so that requests wait for memory too.
    engine = make_engine(policy, 7, max_batch=max_batch, prefill_tokens=prefill_tokens, memory_mb=group - 1)
    completions = play(engine, plan)
    assert_idle(engine)
    samples = [(a.request.request_id, sample) for a in plan for sample in range(a.request.num_samples)]
    assert sorted((c.request_id, c.sample) for c in completions) == samples
    for completion in completions:
        assert_equals_oracle(policy, plan[completion.request_id].request, completion)
        assert np.array_equal(completion.policy_versions, np.full(len(completion.token_ids), 7))


@DTYPES
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_one_packed_training_forward_recomputes_every_log_prob(dtype, temperature) -> None:
    policy = make_policy(2, dtype)
    requests = [make_request(i, n, 3, 40, temperature=temperature) for i, n in enumerate((1, 15, 16, 33, 64))]
    completions = make_engine(policy, max_batch=4, memory_mb=1, prefill_tokens=24).generate(requests)
    sequences = [np.concatenate([requests[c.request_id].prompt_ids, c.token_ids]) for c in completions]
    layout = ops.ChunkLayout.build([len(sequence) for sequence in sequences], CHUNK)
    ends = layout.last_tokens().tolist()
    counts = [len(c.token_ids) for c in completions]
    rows = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, counts, strict=True)])
    ids = torch.from_numpy(np.concatenate(sequences))
    log_probs, _ = policy.log_probs(policy(ids, layout)[rows], ids[rows + 1], temperature)
    assert np.array_equal(log_probs.detach().numpy(), np.concatenate([c.log_probs for c in completions]))


def test_a_sample_does_not_depend_on_its_company() -> None:
    policy = make_policy(3, torch.bfloat16)
    alone = make_engine(policy, max_batch=1, prefill_tokens=16).generate([make_request(0, 37, 4, 30)])
    crowd = [make_request(0, 37, 4, 30), *(make_request(i, 5 * i, 3, 20, seed=i) for i in range(1, 9))]
    together = make_engine(policy, max_batch=32, prefill_tokens=100).generate(crowd)[:4]
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert np.array_equal(one.log_probs, other.log_probs)


@DTYPES
def test_the_thread_count_moves_no_bit(dtype, two_threads) -> None:
    policy = make_policy(2, dtype)
    requests = [make_request(i, n, 2, 4) for i, n in enumerate((16, 40))]
    engine = make_engine(policy, max_batch=5, memory_mb=1, prefill_tokens=32)
    assert torch.get_num_threads() == 2
    completions = engine.generate(requests)
    torch.set_num_threads(1)
    for completion in completions:
        assert_equals_oracle(policy, requests[completion.request_id], completion)


def test_the_oracle_is_no_rubber_stamp() -> None:
    """Samples differ by address, greedy ones do not, other weights show, and both ends of a completion occur."""
    policy = make_policy(2, torch.bfloat16)
    request, greedy = make_request(0, 20, 8, 12), make_request(0, 20, 2, 30, temperature=0.0)
    sampled = [expected(policy, request, sample) for sample in range(8)]
    assert len({tuple(c.token_ids) for c in sampled}) == 8
    assert {c.finish_reason for c in sampled} == {"stop", "length"}
    first, second = (expected(policy, greedy, sample) for sample in range(2))
    assert np.array_equal(first.token_ids, second.token_ids)
    other = expected(make_policy(2, torch.bfloat16, seed=1), greedy, 0)
    assert not np.array_equal(first.log_probs[:1], other.log_probs[:1])
