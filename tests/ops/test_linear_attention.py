"""lightning_attention: the recurrence, whatever way the tokens come in."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from tests.ops.checks import UNIT, assert_within, differentiate, differentiate_fp64, magnitude
from tests.ops.schedules import Schedule, schedules


def qkv(tokens: int, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(tokens, heads, dim), torch.randn(tokens, heads, dim), torch.randn(tokens, heads, dim)


def slopes(heads: int) -> Tensor:
    return 0.7 ** torch.arange(1, heads + 1, dtype=torch.float64)


def test_hand_worked_recurrence() -> None:
    """lambda = 1/2, d = 1: S = 1*1, then 1/2 + 2*3, then 6.5/2 + 1*4."""
    q, k, v = (torch.tensor(x)[:, None, None] for x in ([1.0, 1.0, 2.0], [1.0, 2.0, 1.0], [1.0, 3.0, 4.0]))
    decay = ops.DecayTables.build(torch.tensor([math.log(2.0)]), 16)
    o = ops.lightning_attention(q, k, v, decay, ops.ChunkLayout.build([3], 16))
    torch.testing.assert_close(o.flatten(), torch.tensor([1.0, 6.5, 14.5]))


@pytest.mark.parametrize("chunk", [16, 32])
@pytest.mark.parametrize("lengths", [[1], [17, 3, 70], [16, 32, 33, 1]])
def test_output_and_gradients(lengths: list[int], chunk: int) -> None:
    """All terms are products, so errors scale with the sum of their absolute values. The longest chain of roundings: a
    score (d), a state or tile sum (at most the length), the product with the state (d), and ten single steps (scale,
    decays)."""
    heads, dim = 3, 7
    inputs, grad = qkv(sum(lengths), heads, dim), torch.randn(sum(lengths), heads, dim)
    decay, layout = ops.DecayTables.build(slopes(heads), chunk), ops.ChunkLayout.build(lengths, chunk)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.lightning_attention_reference(q, k, v, slopes(heads), lengths)

    got = differentiate(lambda q, k, v: ops.lightning_attention(q, k, v, decay, layout), inputs, grad)
    want, size = differentiate_fp64(reference, inputs, grad), magnitude(reference, inputs, grad)
    rounding = (2 * dim + max(lengths) + 10) * UNIT[torch.float32]
    assert_within(got.output, want.output, rounding * size.output)
    for actual, expected, absolute in zip(got.inputs, want.inputs, size.inputs, strict=True):
        assert_within(actual, expected, rounding * absolute)


def test_low_precision_input_is_widened_first() -> None:
    inputs = [x.bfloat16() for x in qkv(20, 2, 8)]
    decay, layout = ops.DecayTables.build(slopes(2), 16), ops.ChunkLayout.build([20], 16)
    widened = ops.lightning_attention(*(x.float() for x in inputs), decay, layout)
    assert torch.equal(ops.lightning_attention(*inputs, decay, layout), widened)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("heads", "dim", "chunk"), [(1, 8, 16), (4, 32, 64)])
def test_bits_do_not_depend_on_packing(heads: int, dim: int, chunk: int) -> None:
    lengths = torch.randint(1, 71, (70,)).tolist()
    parts = [x.split(lengths) for x in qkv(sum(lengths), heads, dim)]
    decay = ops.DecayTables.build(slopes(heads), chunk)

    def attend(order: list[int]) -> dict[int, Tensor]:
        layout = ops.ChunkLayout.build([lengths[s] for s in order], chunk)
        q, k, v = (torch.cat([part[s] for s in order]) for part in parts)
        o = ops.lightning_attention(q, k, v, decay, layout)
        return dict(zip(order, o.split([lengths[s] for s in order]), strict=True))

    together, shuffled = attend(list(range(70))), attend(torch.randperm(70).tolist())
    for s in range(0, 70, 3):
        alone = attend([s])[s]
        assert torch.equal(together[s], alone)
        assert torch.equal(shuffled[s], alone)


def follow(schedule: Schedule, q: Tensor, k: Tensor, v: Tensor, decay: ops.DecayTables) -> Tensor:
    """Runs the schedule from pools full of what earlier sequences left; only the states are set to zero."""
    heads, dim = q.shape[1:]
    state = 1000 * torch.randn(schedule.pool_slots, heads, dim, dim)
    pools = [1000 * torch.randn(schedule.pool_slots, heads, schedule.chunk_size, dim) for _ in "kv"]
    state[schedule.slots] = 0.0
    out = torch.full_like(q, float("nan"))
    for step in schedule.steps:
        tokens, slots = schedule.tokens(step), torch.tensor([schedule.slots[s] for s, _, _ in step])
        cache = ops.LightningCache(state, *pools, slots)
        out[tokens] = ops.lightning_attention(q[tokens], k[tokens], v[tokens], decay, schedule.layout(step), cache)
    return out


@given(schedules(), st.sampled_from([(1, 8), (2, 16), (3, 32)]))
@settings(max_examples=200)
def test_decode_is_prefill_is_training(schedule: Schedule, shape: tuple[int, int]) -> None:
    q, k, v = qkv(sum(schedule.lengths), *shape)
    decay = ops.DecayTables.build(slopes(shape[0]), schedule.chunk_size)
    trained = ops.lightning_attention(q, k, v, decay, ops.ChunkLayout.build(schedule.lengths, schedule.chunk_size))
    assert torch.equal(follow(schedule, q, k, v, decay), trained)


@pytest.mark.usefixtures("threads")
def test_large_decode_batch_is_training() -> None:
    lengths, chunk = [34] * 64, 32
    q, k, v = qkv(sum(lengths), 4, 32)
    decay = ops.DecayTables.build(slopes(4), chunk)
    steps = [[(s, 0, 30) for s in range(64)], *([(s, p, p + 1) for s in range(64)] for p in range(30, 34))]
    schedule = Schedule(chunk, lengths, steps, torch.randperm(66)[:64].numpy(), torch.zeros(64, 1).numpy())
    trained = ops.lightning_attention(q, k, v, decay, ops.ChunkLayout.build(lengths, chunk))
    assert torch.equal(follow(schedule, q, k, v, decay), trained)
