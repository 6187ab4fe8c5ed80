"""The network: equal to the equations, equal to itself in training, prefill and decode, and trainable."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from policy.cache import CachePools, CacheView
from policy.names import export_tensors, name_table
from policy.transformer import Policy
from tests.ops.schedules import Schedule, schedules
from tests.policy.equations import Equations
from tests.policy.tiny import VOCAB, make_config, make_policy, shared_policy

DTYPES = [torch.float32, torch.bfloat16]


@cache
def engine_copy(dtype: torch.dtype, chunk_size: int) -> Policy:
    """The same weights without FP32 masters."""
    return copy.deepcopy(shared_policy(dtype, chunk_size)).to_working_dtype()


def poisoned_pools(policy: Policy, slots: int, blocks: int) -> CachePools:
    """Pools as earlier sequences leave them."""
    pools = CachePools(policy.config, slots, blocks, policy.dtype, policy.device)
    for layer in (*pools.linear.values(), *pools.softmax.values()):
        for pool in layer:
            pool.normal_(0.0, 1000.0)
    return pools


@torch.no_grad()
def train_forward(policy: Policy, ids: Tensor, lengths: list[int]) -> Tensor:
    return policy(ids, ops.ChunkLayout.build(lengths, policy.config.chunk_size))


@torch.no_grad()
def follow(schedule: Schedule, policy: Policy, ids: Tensor) -> Tensor:
    pools = poisoned_pools(policy, schedule.pool_slots, schedule.pool_blocks)
    pools.reset_slots(schedule.slots.tolist())
    out = torch.full((len(ids), policy.config.hidden_size), float("nan"))
    for step in schedule.steps:
        sequences, tokens = [s for s, _, _ in step], schedule.tokens(step)
        view = CacheView(pools, torch.from_numpy(schedule.slots[sequences]), schedule.blocks[sequences])
        out[tokens] = policy(ids[tokens], schedule.layout(step), view)
    return out


@pytest.mark.parametrize("convention", ["engine", "hf"])
def test_output_and_gradients_against_the_equations(convention: str) -> None:
    """FP32 errors enter at about 150 u in each of 5 layers (sums of 16 to 64 terms, norms, exp), and later norms
    keep them relative: e = 5 * 150 * 2^-24 = 4.5e-5 of a hidden state of size 1. A log-prob reads it through 32 head
    weights of size 0.3: 10 e. A gradient goes there and back: 2 e of the largest entry of its tensor."""
    error, lengths = 5 * 150 * 2**-24, [37, 18, 1]
    policy = make_policy(make_config(decay_layer_index=convention), torch.float32)
    ids, grad = torch.randint(0, VOCAB, (sum(lengths),)), torch.randn(sum(lengths))
    tensors = {name: tensor.double().requires_grad_() for name, tensor in export_tensors(policy).items()}
    equations = Equations(policy.config.to_hf("float32"), tensors)
    want = torch.cat([equations.log_probs(part.tolist()) for part in ids.split(lengths)])
    (want.gather(1, ids[:, None]).squeeze(1) @ grad.double()).backward()
    hidden = policy(ids, ops.ChunkLayout.build(lengths, policy.config.chunk_size))
    (policy.log_probs(hidden, ids, 1.0)[0] @ grad).backward()
    assert (policy.full_log_probs(hidden, 1.0) - want).abs().max() < 10 * error
    assert want.std() > 1  # so that the bound means something
    parameters = dict(policy.named_parameters())
    for name, (ours, index) in name_table(policy.config).items():
        if ours in parameters:
            expected = tensors[name].grad
            expected = (
                torch.zeros_like(tensors[name]) if expected is None else expected
            )  # an expert that no token chose
            difference = parameters[ours].grad[index] - expected
            assert difference.abs().max() <= 2 * error * expected.abs().max(), name


@given(schedules(max_sequences=3), st.sampled_from(DTYPES))
@settings(max_examples=40)
def test_decode_is_prefill_is_training(schedule: Schedule, dtype: torch.dtype) -> None:
    """Training with FP32 masters, inference without: hidden states and log-probs agree to the bit."""
    trainer, engine = shared_policy(dtype, schedule.chunk_size), engine_copy(dtype, schedule.chunk_size)
    ids = torch.randint(0, VOCAB, (sum(schedule.lengths),))
    trained, inferred = train_forward(trainer, ids, schedule.lengths), follow(schedule, engine, ids)
    assert torch.equal(inferred, trained)
    log_probs, _ = trainer.log_probs(trained, ids, 0.7)
    assert torch.equal(engine.full_log_probs(inferred, 0.7).gather(1, ids[:, None]).squeeze(1), log_probs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prompt", [5, 16, 37])
def test_group_shares_its_prompt(prompt: int, dtype: torch.dtype) -> None:
    """One prefill; its slot and its open block are copied, its full blocks shared by reference."""
    policy, chunk, size = shared_policy(dtype), 16, 3
    ids = torch.randint(0, VOCAB, (prompt + size,))
    pools = poisoned_pools(policy, slots=4, blocks=9)
    pools.reset_slots([2])
    full, blocks = prompt // chunk, np.array([8, 1, 5])
    with torch.no_grad():
        policy(ids[:prompt], ops.ChunkLayout.build([prompt], chunk), CacheView(pools, torch.tensor([2]), blocks[None]))
        pools.copy_slot(2, [0, 3])
        pools.copy_block(int(blocks[full]), [0, 7])
        tables = np.stack([blocks, blocks, blocks])
        tables[1:, full] = [0, 7]
        layout = ops.ChunkLayout.build([1] * size, chunk, [prompt] * size)
        decoded = policy(ids[prompt:], layout, CacheView(pools, torch.tensor([2, 0, 3]), tables))
    for member in range(size):
        sequence = torch.cat([ids[:prompt], ids[prompt + member : prompt + member + 1]])
        assert torch.equal(train_forward(policy, sequence, [prompt + 1])[-1], decoded[member])


def test_pool_sizes() -> None:
    config, dtype = make_config(), torch.bfloat16
    pools = CachePools(config, 3, 5, dtype, torch.device("cpu"))
    slot, block = CachePools.bytes_per_slot(config, dtype), CachePools.bytes_per_block(config, dtype)
    assert 3 * slot == sum(pool.nbytes for layer in pools.linear.values() for pool in layer)
    assert 5 * block == sum(pool.nbytes for layer in pools.softmax.values() for pool in layer)
    assert CachePools.bytes_per_block(config, torch.float32) == 2 * block
    assert (sorted(pools.linear), sorted(pools.softmax)) == ([0, 2], [1, 3, 4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_parameter_learns(dtype: torch.dtype) -> None:
    policy, lengths = make_policy(make_config(), dtype), [40, 33]
    ids = torch.randint(0, VOCAB, (73,))
    hidden = policy(ids, ops.ChunkLayout.build(lengths, 16))
    policy.log_probs(hidden, ids.roll(-1), 1.0)[0].sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_initialisation_follows_its_seed() -> None:
    one, same, other = (Policy(make_config(), torch.float32) for _ in range(3))
    for policy, seed in ((one, 3), (same, 3), (other, 4)):
        policy.initialize(seed)
    assert torch.equal(one.lm_head, same.lm_head)
    assert not torch.equal(one.lm_head, other.lm_head)
    state = one.state_dict()
    assert state["layers.2.attention.query_key_value.weight"].std().item() == pytest.approx(0.3, rel=0.05)
    assert state["layers.2.attention.dense.weight"].std().item() == pytest.approx(0.3 / 10**0.5, rel=0.05)
