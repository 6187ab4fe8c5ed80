"""Engine and trainer are one function for every family: equal tokens, equal bits."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import ops
from policy.config import PolicyConfig
from policy.transformer import Policy
from tests.policy import tiny
from tests.rollout.tiny import assert_equals_oracle, assert_idle, make_engine, make_request

FAMILIES = pytest.mark.parametrize("name", sorted(tiny.FIELDS))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@cache
def make_policy(config: PolicyConfig, dtype: torch.dtype) -> Policy:
    return tiny.make_policy(config, dtype)


@FAMILIES
@DTYPES
def test_engine_equals_the_training_forward(name, dtype) -> None:
    """Prompts on both sides of a chunk's edge, in pieces of a prefill budget, groups that share one, two sequences
    more than fit at once."""
    policy = make_policy(tiny.family_config(name), dtype)
    requests = [make_request(i, n, 2, 12, full_vocab_samples=(1,)) for i, n in enumerate((1, 16, 37, 50))]
    engine = make_engine(policy, max_batch=6, prefill_tokens=24)
    completions = engine.generate(requests)
    assert_idle(engine)
    assert len(completions) == 8
    for completion in completions:
        assert_equals_oracle(policy, requests[completion.request_id], completion)


@FAMILIES
@DTYPES
def test_one_packed_training_forward_recomputes_every_log_prob(name, dtype) -> None:
    policy = make_policy(tiny.family_config(name), dtype)
    requests = [make_request(i, n, 3, 20, temperature=0.7) for i, n in enumerate((1, 15, 33, 64))]
    completions = make_engine(policy, max_batch=4, prefill_tokens=40).generate(requests)
    sequences = [np.concatenate([requests[c.request_id].prompt_ids, c.token_ids]) for c in completions]
    layout = ops.ChunkLayout.build([len(sequence) for sequence in sequences], policy.config.chunk_size)
    ends, counts = layout.last_tokens().tolist(), [len(c.token_ids) for c in completions]
    rows = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, counts, strict=True)])
    ids = torch.from_numpy(np.concatenate(sequences))
    log_probs, _ = policy.log_probs(policy(ids, layout)[rows], ids[rows + 1], 0.7)
    assert np.array_equal(log_probs.detach().numpy(), np.concatenate([c.log_probs for c in completions]))


def test_any_of_several_ends_stops_a_sample() -> None:
    """Ten tokens end a text here, so that all but a few samples stop before their limit, at different ones."""
    stops = tuple(range(10))
    config = replace(tiny.family_config("llama"), eos_token_id=stops)
    policy, request = make_policy(config, torch.float32), make_request(0, 20, 16, 40)
    completions = make_engine(policy, max_batch=8).generate([request])
    assert len({c.token_ids[-1] for c in completions if c.finish_reason == "stop"}) > 3
    for completion in completions:
        ends = np.isin(completion.token_ids, stops)
        assert not ends[:-1].any()
        assert completion.finish_reason == ("stop" if ends[-1] else "length")
        assert_equals_oracle(policy, request, completion)
