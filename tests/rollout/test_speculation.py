"""Drafts by lookup: what is proposed, that it is worth it, and that nothing shows in tokens and log-probs."""

import numpy as np
import pytest
import torch

from rollout.drafts import draft
from rollout.running import Running
from rollout.sequence import Sequence
from tests.rollout.tiny import assert_equals_oracle, make_engine, make_policy, make_request, run


def drafted(tokens: list[int], most: int = 4, drawn: int = 1, max_new_tokens: int = 100) -> list[int]:
    """What is proposed behind `tokens`, the last `drawn` of which are no prompt."""
    running = Running(2, make_policy(2).config)
    prompt = np.array(tokens[: len(tokens) - drawn])
    sequence = Sequence.unstarted(make_request(0, 1, 1, max_new_tokens, prompt_ids=prompt), 0, None)
    running.start(1, sequence, [], 0)
    running.tokens[1, : len(tokens)] = tokens
    running.length[1] = len(tokens)
    (count,) = draft(running, np.array([1]), most, chunk_size=16)
    return running.tokens[1, len(tokens) :][:count].tolist()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5], []),
        ([1, 2, 3, 1], [2, 3, 1]),  # as far as there is something to copy
        ([1, 2, 1, 3, 1], [3, 1]),  # the last occurrence
        ([7, 1, 2, 3, 1, 5, 1, 2], [3, 1, 5, 1]),  # the longest match before the last
        ([7, 8, 9, 4, 8, 9, 5, 7, 8, 9], [4, 8, 9, 5]),
        ([6, 6], [6]),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4], [5, 6]),  # rows 13 and 14: the last of the chunk stays free
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6], []),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7], []),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8], [9, 1, 2, 3]),
    ],
)
def test_what_followed_before_is_proposed(tokens: list[int], expected: list[int]) -> None:
    assert drafted(tokens) == expected


def test_no_more_is_proposed_than_may_be_drawn() -> None:
    assert drafted([1, 2, 3, 1], most=2) == [2, 3]
    assert drafted([1, 2, 3, 1], max_new_tokens=3) == [2]  # one is drawn, one follows a right draft
    assert drafted([1, 2, 3, 1], drawn=0) == []  # a prompt


@pytest.mark.parametrize(("group", "dtype"), [(1, torch.float32), (3, torch.bfloat16)])
def test_the_answers_are_the_same_in_fewer_steps(group: int, dtype: torch.dtype) -> None:
    policy = make_policy(group, dtype, stops=False)
    requests = [make_request(i, 10 + i, 1, 40, temperature=0.0) for i in range(3)]
    steps = []
    for tokens in (0, 5):
        engine = make_engine(policy, max_batch=4, speculative_tokens=tokens)
        for request in requests:
            engine.submit(request)
        count = 0
        while engine.has_work:
            completions, count = engine.step(), count + 1
            for completion in completions:
                assert_equals_oracle(policy, requests[completion.request_id], completion)
        steps.append(count)
    description = engine.describe()
    assert steps[1] < steps[0]
    assert 0 < description["accepted_tokens"] <= description["drafted_tokens"]
    assert description["acceptance_rate"] == description["accepted_tokens"] / description["drafted_tokens"]


def test_a_stop_token_among_right_drafts_ends_the_sample() -> None:
    """Greedy answers run in circles, so a token of the circle is drafted; it stops the second sample."""
    policy = make_policy(2, torch.float32, stops=False)
    whole = make_request(0, 12, 1, 60, temperature=0.0)
    engine = make_engine(policy, max_batch=4, speculative_tokens=5)
    engine.submit(whole)
    (completion,) = run(engine)
    for stop in np.unique(completion.token_ids[20:]).tolist():
        request = make_request(1, 12, 1, 60, temperature=0.0, stop_token_ids=(stop,), min_new_tokens=30)
        engine.submit(request)
        for ended in run(engine):
            assert_equals_oracle(policy, request, ended)
