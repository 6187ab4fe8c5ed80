"""Tiny policies, requests and engines for the rollout tests, and the invariants that hold after every engine step."""

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from policy.config import PolicyConfig
from policy.names import export_tensors
from policy.transformer import Policy
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Completion, Request, SamplingParams
from tests.rollout import oracle

VOCAB, CHUNK, EOS = 40, 16, 0


@cache
def make_policy(group: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Policy:
    """The trainer's copy. group 2: linear, softmax MoE, softmax MoE; group 3: linear, linear MoE, softmax MoE."""
    config = PolicyConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        layer_group_size=group,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=48,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        num_experts=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=EOS,
        chunk_size=CHUNK,
    )
    policy = Policy(config, dtype)
    policy.initialize(seed)
    _make_eos_likely(policy)
    return policy


@torch.no_grad()
def _make_eos_likely(policy: Policy) -> None:
    """A channel that every token raises, and that only the end of text reads: samples end after some 3 to 12 tokens."""
    policy.word_embeddings[:, 0] = 12.0
    policy.lm_head[:, 0] = 0.0
    policy.lm_head[EOS, 0] = 1.0
    for name, buffer in policy.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))


def make_engine(policy: Policy, policy_version: int = 0, **config: int) -> Engine:
    """An engine with its own copy of the weights, in the working dtype and by way of their exported names."""
    copy = Policy(policy.config, policy.dtype)
    copy.initialize(seed=99)
    engine = Engine(copy.to_working_dtype(), RolloutConfig(**{"memory_mb": 4, **config}), policy_version)
    engine.load_weights(export_tensors(policy), policy_version)
    return engine


def make_request(
    request_id: int,
    length: int,
    num_samples: int = 1,
    max_new_tokens: int = 8,
    seed: int = 0,
    full_vocab_samples: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Request:
    """The prompt, its address and the step follow from `length`, so that equal arguments ask for equal completions."""
    sampling = SamplingParams(max_new_tokens, temperature, top_p, top_k)
    prompt_ids = np.random.default_rng(length).integers(1, VOCAB, length)
    return Request(request_id, prompt_ids, num_samples, sampling, seed, length % 3, length, full_vocab_samples)


def expected(policy: Policy, request: Request, sample: int) -> Completion:
    """The oracle's answer, remembered: `make_request` makes it a function of these arguments."""
    return _expected(policy, len(request.prompt_ids), request.sampling, request.seed, sample)


@cache
def _expected(policy: Policy, length: int, sampling: SamplingParams, seed: int, sample: int) -> Completion:
    request = make_request(0, length, sample + 1, seed=seed)
    return oracle.complete(policy, replace(request, sampling=sampling), sample)


def assert_equals_oracle(policy: Policy, request: Request, got: Completion) -> None:
    """Bit for bit; an aborted sample holds the beginning."""
    want = expected(policy, request, got.sample)
    count = len(got.token_ids)
    if got.finish_reason == "abort":
        assert count < len(want.token_ids)
    else:
        assert (got.finish_reason, count) == (want.finish_reason, len(want.token_ids))
    assert np.array_equal(got.token_ids, want.token_ids[:count])
    assert np.array_equal(got.log_probs, want.log_probs[:count])
    if got.sample in request.full_vocab_samples and count:
        assert got.full_log_probs is not None and want.full_log_probs is not None
        assert np.array_equal(got.full_log_probs, want.full_log_probs[:count])
    else:
        assert got.full_log_probs is None


def assert_memory_is_owned(engine: Engine) -> None:
    """Every slot and block is free, or held by exactly the samples that say so."""
    held = [(group, index) for group in engine.scheduler.prefilling for index in range(len(group.samples))]
    held += [(engine.running.group[slot], engine.running.index[slot]) for slot in engine.running.rows().tolist()]
    slots = [group.slots[index] for group, index in held]
    assert sorted(slots + engine.slots._free) == list(range(engine.config.max_batch))
    references = Counter(block for group, index in held for block in engine.scheduler.block_row(group, index).tolist())
    assert engine.blocks._references == [references[block] for block in range(engine.num_blocks)]
    assert sorted([*references, *engine.blocks._free]) == list(range(engine.num_blocks))
    own = Counter(block for group, index in held for block in group.own_blocks[index])
    assert all(count == 1 == references[block] for block, count in own.items())


def assert_idle(engine: Engine) -> None:
    """All memory is back and nothing of a sample is left."""
    assert not engine.has_work
    assert (engine.slots.num_free, engine.blocks.num_free) == (engine.config.max_batch, engine.num_blocks)
    assert not engine.running.active.any()
    assert engine.running.group == [None] * engine.config.max_batch
    assert engine.running.full_vocab == {}


def samples_of(completions: list[Completion]) -> list[tuple[int, int]]:
    return [(completion.request_id, completion.sample) for completion in completions]


def run(engine: Engine) -> list[Completion]:
    """Steps until nothing is left, with the memory checked after every step."""
    completions: list[Completion] = []
    while engine.has_work:
        completions += engine.step()
        assert_memory_is_owned(engine)
    assert_idle(engine)
    return completions


def assert_same(got: list[Completion], want: list[Completion]) -> None:
    assert samples_of(got) == samples_of(want)
    for one, other in zip(got, want, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert np.array_equal(one.log_probs, other.log_probs)
