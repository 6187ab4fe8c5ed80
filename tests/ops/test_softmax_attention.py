"""softmax_attention: causal, grouped heads, and the same bits whatever way the tokens come in."""

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from tests.ops.checks import UNIT, assert_within, differentiate, differentiate_fp64
from tests.ops.schedules import Schedule, schedules

GROUPS = (1, 2, 4, 8)


def qkv(tokens: int, kv_heads: int, groups: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(tokens, kv_heads * groups, dim)
    return q, torch.randn(tokens, kv_heads, dim), torch.randn(tokens, kv_heads, dim)


def test_hand_worked() -> None:
    """d = 1. The second query scores 0 and log 3: weights 1/4 and 3/4."""
    q, k, v = (torch.tensor(x)[:, None, None] for x in ([5.0, math.log(3.0)], [0.0, 1.0], [8.0, 4.0]))
    o = ops.softmax_attention(q, k, v, ops.ChunkLayout.build([2], 16))
    torch.testing.assert_close(o.flatten(), torch.tensor([8.0, 5.0]))


def test_query_heads_share_key_value_heads_in_order() -> None:
    """Four query heads, two key-value heads: a lone token returns its value, head h that of h // 2."""
    v = torch.tensor([[[1.0], [2.0]]])
    o = ops.softmax_attention(torch.randn(1, 4, 1), torch.randn(1, 2, 1), v, ops.ChunkLayout.build([1], 16))
    assert o.flatten().tolist() == [1.0, 1.0, 2.0, 2.0]


def test_huge_scores_do_not_overflow() -> None:
    q, k, v = (
        torch.full((40, 1, 1), 1e4),
        torch.linspace(-1e4, 1e4, 40).view(40, 1, 1),
        torch.arange(40.0).view(40, 1, 1),
    )
    o = ops.softmax_attention(q, k, v, ops.ChunkLayout.build([40], 16))
    assert torch.equal(o, v)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("lengths", "chunk"), [([1], 16), ([17, 3, 70], 16), ([16, 33, 1], 32)])
def test_output_and_gradients(lengths: list[int], chunk: int, groups: int) -> None:
    """A score is off by (d + 3) u sum|q k| d^-1/2, so by (d + 3) u S at most; a weight p, a ratio of exponentials of
    two differences, by delta = 2 (d + 3) u S + (L + 8) u of itself. With P' g the gradient of v for a gradient g of
    the output:

    o   (delta + L u) P |v|, and P |v| <= max |v|
    dv  (delta + L G u) P' |g|
    ds  = p (g v - mean): |ds| <= p A with A = 2 d max|g| max|v|, off by (delta + (2 d + L) u) p A
    dq  = d^-1/2 ds k: sum_j p_ij = 1, so (delta + (2 d + 2 L) u) d^-1/2 A max|k|
    dk  the same with q and column sums of P, which are P' 1: (delta + (2 d + L + L G) u) d^-1/2 A max|q| P' 1
    """
    kv_heads, dim, length = 2, 5, max(lengths)
    inputs = qkv(sum(lengths), kv_heads, groups, dim)
    grad, layout = torch.randn_like(inputs[0]), ops.ChunkLayout.build(lengths, chunk)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.softmax_attention_reference(q, k, v, lengths)

    got = differentiate(lambda q, k, v: ops.softmax_attention(q, k, v, layout), inputs, grad)
    want = differentiate_fp64(reference, inputs, grad)
    q_max, k_max, v_max, g_max = (x.abs().max().item() for x in (*inputs, grad))
    u = UNIT[torch.float32]
    delta = 2 * (dim + 3) * u * dim**0.5 * q_max * k_max + (length + 8) * u
    score_grad = 2 * dim * g_max * v_max * dim**-0.5
    mass = differentiate_fp64(reference, inputs, torch.ones_like(grad)).inputs[2]
    spread = differentiate_fp64(reference, inputs, grad.abs()).inputs[2]
    dq_bound = (delta + 2 * (dim + length) * u) * score_grad * k_max
    dk_bound = (delta + (2 * dim + length * (1 + groups)) * u) * score_grad * q_max * mass
    assert_within(got.output, want.output, (delta + length * u) * v_max)
    assert_within(got.inputs[0], want.inputs[0], dq_bound)
    assert_within(got.inputs[1], want.inputs[1], dk_bound)
    assert_within(got.inputs[2], want.inputs[2], (delta + length * groups * u) * spread)


def test_low_precision_input_is_widened_first() -> None:
    inputs, layout = [x.bfloat16() for x in qkv(20, 2, 2, 8)], ops.ChunkLayout.build([20], 16)
    widened = ops.softmax_attention(*(x.float() for x in inputs), layout)
    assert torch.equal(ops.softmax_attention(*inputs, layout), widened)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("kv_heads", "groups", "dim", "chunk"), [(1, 1, 8, 16), (2, 4, 32, 64)])
def test_bits_do_not_depend_on_packing(kv_heads: int, groups: int, dim: int, chunk: int) -> None:
    lengths = torch.randint(1, 71, (70,)).tolist()
    parts = [x.split(lengths) for x in qkv(sum(lengths), kv_heads, groups, dim)]

    def attend(order: list[int]) -> dict[int, Tensor]:
        layout = ops.ChunkLayout.build([lengths[s] for s in order], chunk)
        q, k, v = (torch.cat([part[s] for s in order]) for part in parts)
        return dict(zip(order, ops.softmax_attention(q, k, v, layout).split([lengths[s] for s in order]), strict=True))

    together, shuffled = attend(list(range(70))), attend(torch.randperm(70).tolist())
    for s in range(0, 70, 3):
        alone = attend([s])[s]
        assert torch.equal(together[s], alone)
        assert torch.equal(shuffled[s], alone)


def follow(schedule: Schedule, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Runs the schedule from pools full of what earlier sequences left."""
    key, value = (1000 * torch.randn(schedule.pool_blocks, k.shape[1], schedule.chunk_size, k.shape[2]) for _ in "kv")
    out = torch.full_like(q, float("nan"))
    for step in schedule.steps:
        tokens = schedule.tokens(step)
        cache = ops.PagedCache(key, value, schedule.blocks[[s for s, _, _ in step]])
        out[tokens] = ops.softmax_attention(q[tokens], k[tokens], v[tokens], schedule.layout(step), cache)
    return out


@given(schedules(), st.sampled_from([(1, 8), (2, 16), (1, 32)]), st.sampled_from(GROUPS))
@settings(max_examples=200)
def test_decode_is_prefill_is_training(schedule: Schedule, shape: tuple[int, int], groups: int) -> None:
    q, k, v = qkv(sum(schedule.lengths), shape[0], groups, shape[1])
    trained = ops.softmax_attention(q, k, v, ops.ChunkLayout.build(schedule.lengths, schedule.chunk_size))
    assert torch.equal(follow(schedule, q, k, v), trained)


@pytest.mark.usefixtures("threads")
def test_large_decode_batch_is_training() -> None:
    lengths, chunk = [34] * 64, 32
    q, k, v = qkv(sum(lengths), 2, 2, 32)
    steps = [[(s, 0, 30) for s in range(64)], *([(s, p, p + 1) for s in range(64)] for p in range(30, 34))]
    schedule = Schedule(chunk, lengths, steps, np.arange(64), torch.randperm(128).view(64, 2).numpy())
    assert torch.equal(follow(schedule, q, k, v), ops.softmax_attention(q, k, v, ops.ChunkLayout.build(lengths, chunk)))


@given(schedules(), st.sampled_from(GROUPS))
@settings(max_examples=50)
def test_segments_are_the_same_on_every_way(schedule: Schedule, groups: int) -> None:
    """Short segments, so that short sequences have several."""
    q, k, v = qkv(sum(schedule.lengths), 2, groups, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("ops.softmax_attention"), "SEGMENT", 2 * schedule.chunk_size)
        trained = ops.softmax_attention(q, k, v, ops.ChunkLayout.build(schedule.lengths, schedule.chunk_size))
        assert torch.equal(follow(schedule, q, k, v), trained)


@pytest.mark.parametrize(("segment", "expected"), [(16, 1 + 2.0**-23), (1024, 1.0)])
def test_sums_run_in_segments(monkeypatch: pytest.MonkeyPatch, segment: int, expected: float) -> None:
    """Values 1, 0, ..., 0 | 2^-24, 2^-24, 0, ...: the second segment of 16 is 2^-23, which 1 takes in whole. One after
    another each 2^-24 would be lost. All 32 weights are equal."""
    monkeypatch.setattr(importlib.import_module("ops.softmax_attention"), "SEGMENT", segment)
    v = torch.zeros(32, 1, 8)
    v[0], v[16:18] = 1.0, 2.0**-24
    o = ops.softmax_attention(torch.zeros(32, 1, 8), torch.zeros(32, 1, 8), v, ops.ChunkLayout.build([32], 16))
    assert o[31].unique().tolist() == [expected / 32]
