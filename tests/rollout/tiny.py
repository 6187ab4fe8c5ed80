"""Tiny policies, requests and engines for the rollout tests, and the invariants that hold after every engine step."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from policy.config import PolicyConfig
from policy.names import export_tensors
from policy.transformer import Policy
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.memory import BlockPool
from rollout.prefix_cache import PrefixCache
from rollout.request import Completion, Request, SamplingParams
from rollout.stop_strings import Decode
from tests.rollout import oracle

VOCAB, CHUNK, EOS = 40, 16, 0


@cache
def make_policy(group: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, stops: bool = True) -> Policy:
    """The trainer's copy. group 1: softmax, twice with MoE; 2: linear, softmax MoE, softmax MoE; 3: linear, linear MoE,
    softmax MoE. stops: samples end early."""
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
    _make_eos_likely(policy, 1.0 if stops else -1.0)
    return policy


@torch.no_grad()
def _make_eos_likely(policy: Policy, weight: float) -> None:
    """A channel that every token raises, and that only the end of text reads: samples end after some 3 to 12 tokens."""
    policy.word_embeddings[:, 0] = 12.0
    policy.lm_head[:, 0] = 0.0
    policy.lm_head[EOS, 0] = weight
    for name, buffer in policy.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))


def make_engine(
    policy: Policy, policy_version: int = 0, decode: Decode | None = None, blocks: int | None = None, **config: object
) -> Engine:
    """An engine with its own copy of the weights, in the working dtype and by way of their exported names. blocks: as
    if its memory held so many, and two snapshots."""
    copy = Policy(policy.config, policy.dtype)
    copy.initialize(seed=99)
    settings = RolloutConfig(**{"memory_mb": 4, **config})
    engine = Engine(copy.to_working_dtype(), settings, policy_version, decode)
    engine.load_weights(export_tensors(policy), policy_version)
    if blocks is not None:
        _shrink(engine, blocks)
    return engine


def _shrink(engine: Engine, blocks: int) -> None:
    snapshots = None if engine.budget.snapshots is None else min(2, engine.budget.snapshots)
    engine.budget = replace(engine.budget, blocks=blocks, snapshots=snapshots)
    engine.blocks = engine.scheduler.blocks = BlockPool(blocks)
    if engine.cache:
        engine.cache = engine.scheduler.cache = PrefixCache(engine.blocks, snapshots, engine.chunk_size)


def make_request(
    request_id: int,
    length: int,
    num_samples: int = 1,
    max_new_tokens: int = 8,
    seed: int = 0,
    full_vocab_samples: tuple[int, ...] = (),
    prompt_ids: np.ndarray | None = None,
    **sampling: Any,
) -> Request:
    """The prompt, its address and the step follow from `length`; prompt_ids: another prompt under that address."""
    if prompt_ids is None:
        prompt_ids = np.random.default_rng(length).integers(1, VOCAB, length)
    settings = SamplingParams(max_new_tokens, **sampling)
    return Request(request_id, prompt_ids, num_samples, settings, seed, length % 3, length, full_vocab_samples)


def text_of(ids: list[int]) -> str:
    """Of most tokens a letter; 36 is nothing, 37 two letters, 38 and 39 are the halves of one character."""
    pieces = {36: b"", 37: b"ab", 38: "\u00e9".encode()[:1], 39: "\u00e9".encode()[1:]}
    return b"".join(pieces.get(token, bytes([97 + token % 6])) for token in ids).decode(errors="replace")


def expected(policy: Policy, request: Request, sample: int) -> Completion:
    """The oracle's answer when the weights never change."""
    return oracle.complete({0: policy}, request, sample, [0], text_of)


def assert_equals_oracle(policy: Policy, request: Request, got: Completion) -> None:
    """Bit for bit, of one version; an aborted sample holds the beginning."""
    assert_is(oracle.complete({0: policy}, request, got.sample, [0], text_of), request, got)


def assert_equals_versions(policies: Mapping[int, Policy], request: Request, got: Completion) -> None:
    """The same with every token under the version that the completion says."""
    versions = got.policy_versions.tolist()
    want = oracle.complete(policies, request, got.sample, versions or [0], text_of)
    assert_is(want, request, got)
    assert np.array_equal(got.policy_versions, want.policy_versions[: len(versions)])


def assert_is(want: Completion, request: Request, got: Completion) -> None:
    count, sampling = len(got.token_ids), request.sampling
    if got.finish_reason == "abort":
        assert count < len(want.token_ids)
    else:
        assert (got.finish_reason, count) == (want.finish_reason, len(want.token_ids))
    kept = {
        "token_ids": True,
        "log_probs": True,
        "full_log_probs": got.sample in request.full_vocab_samples and count > 0,
        "processed_log_probs": sampling.processed_log_probs and got.processed_log_probs is not None,
        "top_token_ids": sampling.top_log_probs > 0 and count > 0,
        "top_log_probs": sampling.top_log_probs > 0 and count > 0,
    }
    for name, is_kept in kept.items():
        assert (getattr(got, name) is not None) == is_kept, name
        assert not is_kept or np.array_equal(getattr(got, name), getattr(want, name)[:count]), name
    if sampling.processed_log_probs and count:
        assert got.processed_log_probs is not None


def assert_memory_is_owned(engine: Engine) -> None:
    """Every slot, block and snapshot is free, or held by those that say so; what is written next is not shared."""
    running, chunk = engine.running, engine.chunk_size
    used = running.slots().tolist()
    kept = [slot for each in used for _, slot in running.sequence[each].followers]
    assert sorted(used + kept + engine.slots._free) == list(range(engine.config.max_batch))
    assert engine.scheduler.leaders == {slot for slot in used if running.sequence[slot].followers}
    references = Counter(block for slot in used for block in running.blocks(slot))
    assert engine.blocks._references == [references[block] for block in range(engine.budget.blocks)]
    free = [*engine.blocks._empty, *engine.blocks._idle]
    assert sorted([*references, *free]) == list(range(engine.budget.blocks))
    assert engine.blocks._idle.keys() == engine.blocks.cached - references.keys()
    for slot in used:
        assert len(running.blocks(slot)) * chunk >= running.computed[slot]
        own = running.blocks(slot)[running.computed[slot] // chunk :]
        assert all(references[block] == 1 and block not in engine.blocks.cached for block in own)
    if engine.cache:
        _assert_cache_is_whole(engine.cache, engine)


def _assert_cache_is_whole(cache: PrefixCache, engine: Engine) -> None:
    chunks = set(cache._chunks.values())
    assert set(cache._by_block.values()) == chunks
    assert {chunk.block for chunk in chunks} == engine.blocks.cached == set(cache._by_block)
    assert all(key == chunk.key and key[0] == engine.policy_version for key, chunk in cache._chunks.items())
    snapshots = {chunk.snapshot: chunk for chunk in chunks if chunk.snapshot is not None}
    assert snapshots == dict(cache._snapshots)
    assert sorted([*snapshots, *cache._free_snapshots]) == list(range(engine.budget.snapshots or 0))


def assert_idle(engine: Engine) -> None:
    """All memory is back and nothing of a sample is left."""
    assert not engine.has_work
    assert not engine.scheduler.waiting
    assert (engine.slots.num_free, engine.blocks.num_free) == (engine.config.max_batch, engine.budget.blocks)
    assert not engine.running.active.any()
    assert engine.running.sequence == [None] * engine.config.max_batch
    assert not engine.running.watched
    assert not engine.scheduler.leaders
    assert not engine.scheduler._to_cache


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
