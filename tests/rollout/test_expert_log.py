"""Routing replay from the engine's side: the experts that a completion comes with are those of the whole forward."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ops import ChunkLayout
from policy.routing import Routing
from policy.transformer import Policy
from rollout.request import Request, SamplingParams
from tests.rollout.tiny import VOCAB, make_engine, make_policy


def requests() -> list[Request]:
    random = np.random.default_rng(0)
    lengths = [(1, 3), (16, 2), (37, 4), (20, 1)]
    return [
        Request(
            index, random.integers(1, VOCAB, length), samples, SamplingParams(max_new_tokens=24), seed=5, prompt=index
        )
        for index, (length, samples) in enumerate(lengths)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_record_is_what_one_forward_over_the_sequence_chooses(dtype: torch.dtype) -> None:
    """Whatever the batches: four slots for ten samples, prompts in pieces of 16 tokens."""
    policy = make_policy(dtype=dtype)
    engine = make_engine(policy, max_batch=4, prefill_tokens=16, routing_replay="weights")
    asked = requests()
    for completion in engine.generate(asked):
        sequence = np.concatenate([asked[completion.request_id].prompt_ids, completion.token_ids])
        routing = Routing()
        with torch.no_grad():
            policy(
                torch.from_numpy(sequence),
                ChunkLayout.build([len(sequence)], policy.config.chunk_size),
                routing=routing,
            )
        assert completion.routed_experts is not None and completion.routed_weights is not None
        assert (completion.routed_experts.dtype, completion.routed_weights.dtype) == (np.int16, np.float32)
        assert np.array_equal(completion.routed_experts, routing.chosen().numpy()[:-1])
        assert np.array_equal(completion.routed_weights, routing.weights().numpy()[:-1])


def test_recording_moves_no_token_and_no_bit() -> None:
    policy = make_policy()
    plain, experts, weights = (
        make_engine(policy, max_batch=4, routing_replay=kept).generate(requests())
        for kept in ("none", "experts", "weights")
    )
    for one, other, third in zip(plain, experts, weights, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids) and np.array_equal(one.token_ids, third.token_ids)
        assert np.array_equal(one.log_probs, other.log_probs) and np.array_equal(one.log_probs, third.log_probs)
        assert one.routed_experts is one.routed_weights is other.routed_weights is None
        assert np.array_equal(other.routed_experts, third.routed_experts)


def test_a_policy_without_mixtures_is_refused() -> None:
    dense = Policy(replace(make_policy().config, first_k_dense_replace=3), torch.float32)
    with pytest.raises(ValueError, match=r"routing_replay = experts: the policy has no mixture .* set it to none"):
        make_engine(dense, max_batch=4, routing_replay="experts")
