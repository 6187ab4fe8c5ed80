"""softmax_attention in Triton: causal, grouped heads, and one set of bits in training, prefill and decode.

Values that a test gives to BF16 operands are BF16 numbers, so what is measured is the operator's own rounding.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from ops.dispatch import Path, force, use_fast
from tests.ops.checks import UNIT, assert_within, differentiate, differentiate_fp64
from tests.ops.kernels.harness import DEVICE, ON_GPU, adversarial, poison
from tests.ops.schedules import Schedule, schedules

operator = importlib.import_module("ops.softmax_attention")  # the package exports the function under this name

BF16, FP32 = torch.bfloat16, torch.float32
U = UNIT[FP32]


def qkv(tokens: int, kv_heads: int, groups: int, dim: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor, Tensor]:
    """q and k in FP32, as RoPE leaves them, v in the working type."""
    heads = kv_heads * groups, kv_heads, kv_heads
    q, k, v = (torch.randn(tokens, count, dim).to(DEVICE, dtype) for count in heads)
    return q.float(), k.float(), v


def layout(lengths: list[int], chunk: int, starts: list[int] | None = None) -> ops.ChunkLayout:
    return ops.ChunkLayout.build(lengths, chunk, starts, DEVICE)


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 positions, so that small tests have several."""
    monkeypatch.setattr(operator, "SEGMENT", 32)


@pytest.fixture
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    def like(x: Tensor, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return poison(*shape, dtype=dtype)

    monkeypatch.setattr(operator, "like", like)


def test_hand_worked() -> None:
    """d = 1. The second query scores 0 and log 3: weights 1/4 and 3/4."""
    values = ([5.0, math.log(3.0)], [0.0, 1.0], [8.0, 4.0])
    q, k, v = (torch.tensor(x, device=DEVICE)[:, None, None] for x in values)
    o = ops.softmax_attention(q, k, v, layout([2], 16))
    torch.testing.assert_close(o.flatten().cpu(), torch.tensor([8.0, 5.0]))


def test_query_heads_share_key_value_heads_in_order() -> None:
    """Four query heads, two key-value heads: a lone token returns its value, head h that of h // 2."""
    q, k, v = torch.randn(1, 4, 1), torch.randn(1, 2, 1), torch.tensor([[[1.0], [2.0]]])
    o = ops.softmax_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), layout([1], 16))
    assert o.flatten().tolist() == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.usefixtures("short_segments")
def test_huge_scores_do_not_overflow() -> None:
    """The last key wins by far, in whichever segment it is. Scores to 1e8, whose exponents are whole numbers."""
    values = torch.full((40,), 1e4), torch.linspace(-1e4, 1e4, 40), torch.arange(40.0)
    q, k, v = (x.view(40, 1, 1).to(DEVICE) for x in values)
    torch.testing.assert_close(ops.softmax_attention(q, k, v, layout([40], 16)), v, rtol=2 * U, atol=0.0)


@pytest.mark.usefixtures("poisoned_scratch")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("lengths", "chunk", "shape", "segment"),
    [([17, 3, 70], 16, (2, 2, 5), 32), ([1, 33], 32, (1, 4, 16), 32), ([130], 64, (1, 3, 32), 64)],
)
def test_output_and_gradients(
    lengths: list[int],
    chunk: int,
    shape: tuple[int, int, int],
    segment: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bounds of the CPU path, in tests/ops/test_softmax_attention.py, with delta larger by 2 S u for the exponent,
    which is rounded twice and whose log-sum is rounded once, and by 4 u for each exp2: a weight meets two, and one for
    every block that follows. To BF16 are rounded: a weight, and the gradient of the output twice (in delta too) and a
    score's gradient on their way to products."""
    monkeypatch.setattr(operator, "SEGMENT", segment)
    (_, groups, dim), inputs = shape, qkv(sum(lengths), *shape, dtype)
    grad, batch, length = torch.randn(inputs[0].shape).to(DEVICE), layout(lengths, chunk), max(lengths)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.softmax_attention_reference(q, k, v, lengths)

    got = differentiate(lambda q, k, v: ops.softmax_attention(q, k, v, batch), inputs, grad)
    want = differentiate_fp64(reference, inputs, grad)
    q_max, k_max, v_max, g_max = (x.abs().max().item() for x in (*inputs, grad))
    score = dim**0.5 * q_max * k_max
    delta = 2 * (dim + 4) * U * score + (length + 4 * (length / chunk + 4)) * U
    low = 0.0 if dtype == FP32 else UNIT[BF16] * (1 + 2**-5)
    score_grad = 2 * dim * g_max * v_max * dim**-0.5
    mass = differentiate_fp64(reference, inputs, torch.ones_like(grad)).inputs[2]
    spread = differentiate_fp64(reference, inputs, grad.abs()).inputs[2]
    assert_within(got.output, want.output, (delta + length * U + low) * v_max)
    dq_bound = (delta + 2 * (dim + length) * U + 2 * low) * score_grad * k_max
    assert_within(got.inputs[0], want.inputs[0], dq_bound)
    dk_bound = (delta + (2 * dim + length * (1 + groups)) * U + 2 * low) * score_grad * q_max * mass
    assert_within(got.inputs[1], want.inputs[1], dk_bound)
    assert_within(got.inputs[2], want.inputs[2], (delta + length * groups * U + 3 * low) * spread)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize(("dtype", "groups"), [(FP32, 2), (BF16, 4)])
def test_bits_do_not_depend_on_packing(dtype: torch.dtype, groups: int) -> None:
    """Nor do those of the gradients, which nobody is owed, nor on the order of programs."""
    lengths = [40, 1, 17, 16, 49]
    inputs = qkv(sum(lengths), 1, groups, 16, dtype)
    grad = torch.randn(inputs[0].shape).to(DEVICE)

    def attend(order: list[int], seed: int) -> list[tuple[Tensor, ...]]:
        *chosen, incoming = (torch.cat([x.split(lengths)[s] for s in order]) for x in (*inputs, grad))
        batch = layout([lengths[s] for s in order], 16)
        with adversarial(seed):
            run = differentiate(lambda *qkv: ops.softmax_attention(*qkv, batch), tuple(chosen), incoming)
        sizes = [lengths[s] for s in order]
        return list(zip(*(x.split(sizes) for x in (run.output, *run.inputs)), strict=True))

    together, shuffled = attend([0, 1, 2, 3, 4], 1), attend([3, 0, 4, 2, 1], 2)
    for s, place in ((0, 1), (1, 4), (4, 2)):
        alone = attend([s], s + 3)[0]
        assert all(torch.equal(a, b) for a, b in zip(together[s], alone, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(shuffled[place], alone, strict=True))


def test_inputs_may_be_parts_of_one_tensor() -> None:
    """As the fused projection leaves them: every token's heads are dense, tokens are not."""
    packed, batch, grad = torch.randn(20, 6, 16).to(DEVICE, BF16), layout([20], 16), torch.randn(20, 4, 16).to(DEVICE)
    parts = tuple(x.contiguous() for x in packed.split([4, 1, 1], dim=1))
    want = differentiate(lambda *x: ops.softmax_attention(*x, batch), parts, grad)
    packed.requires_grad_()
    o = ops.softmax_attention(*packed.split([4, 1, 1], dim=1), batch)
    assert torch.equal(o, want.output)
    assert torch.equal(torch.autograd.grad(o, packed, grad)[0], torch.cat(want.inputs, dim=1))


def poisoned(schedule: Schedule, k: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [poison(schedule.pool_blocks, k.shape[1], schedule.chunk_size, k.shape[2], dtype=dtype) for _ in "kv"]


def assert_holds(schedule: Schedule, pool: Tensor, x: Tensor) -> None:
    """The pool holds the rows of x where the sequences have their blocks, and nothing anywhere else."""
    want = torch.full_like(pool, float("nan"))
    for s, rows in enumerate(x.to(pool.dtype).split(schedule.lengths)):
        for number, row in enumerate(rows):
            want[schedule.blocks[s, number // schedule.chunk_size], :, number % schedule.chunk_size] = row
    assert torch.equal(pool.nan_to_num(-1e9), want.nan_to_num(-1e9))


def follow(schedule: Schedule, inputs: tuple[Tensor, ...], pools: list[Tensor], no_block: int = 2**30) -> Tensor:
    """Runs the schedule. Whatever nobody has written is NaN, blocks that a sequence has no need of are nowhere, and
    programs run in another order in every step."""
    out = poison(*inputs[0].shape)
    for number, step in enumerate(schedule.steps):
        tokens = schedule.tokens(step).to(DEVICE)
        blocks = schedule.blocks[[s for s, _, _ in step]].copy()
        for row, (_, _, end) in zip(blocks, step, strict=True):
            row[-(-end // schedule.chunk_size) :] = no_block
        cache = ops.PagedCache(*pools, torch.from_numpy(blocks).to(DEVICE))
        batch = layout([e - b for _, b, e in step], schedule.chunk_size, [b for _, b, _ in step])
        with adversarial(number + 2):
            out[tokens] = ops.softmax_attention(*(x[tokens] for x in inputs), batch, cache)
    return out


def trained(schedule: Schedule, inputs: tuple[Tensor, ...]) -> Tensor:
    with adversarial(1):
        return ops.softmax_attention(*inputs, layout(schedule.lengths, schedule.chunk_size))


@pytest.fixture(params=[False, True], ids=["whole", "split"])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all segments of a tile, or one for each."""
    for limit in ("_DECODE_PROGRAMS", "_TILE_PROGRAMS"):
        monkeypatch.setattr(operator, limit, 2**30 if request.param else 0)


TYPES = (FP32, FP32), (BF16, BF16), (BF16, FP32)  # of v and of the pools
SHAPES = (1, 1, 8), (1, 2, 16), (2, 4, 16), (1, 3, 16)  # key-value heads, groups, d


@pytest.mark.usefixtures("short_segments", "poisoned_scratch", "split")
@given(schedules(max_sequences=2), st.sampled_from(TYPES), st.sampled_from(SHAPES))
@settings(max_examples=5)
def test_decode_is_prefill_is_training(
    schedule: Schedule, types: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int]
) -> None:
    inputs = qkv(sum(schedule.lengths), *shape, types[0])
    pools = poisoned(schedule, inputs[1], types[1])
    assert torch.equal(follow(schedule, inputs, pools), trained(schedule, inputs))
    for pool, x in zip(pools, inputs[1:], strict=True):
        assert_holds(schedule, pool, x)


def decoding(chunk: int, *pieces: tuple[int, int]) -> Schedule:
    """One sequence, cut as given."""
    steps = [[(0, begin, end)] for begin, end in pieces]
    blocks = np.random.permutation(-(-pieces[-1][1] // chunk) + 1)[None].astype(np.int32)
    return Schedule(chunk, [pieces[-1][1]], steps, np.zeros(1, dtype=np.int64), blocks)


@pytest.mark.usefixtures("poisoned_scratch")
def test_production_tile_and_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """d 128, blocks of 64, and the last tokens of a segment and the first of the next, in either form."""
    schedule = decoding(64, (0, 1022), *((position, position + 1) for position in range(1022, 1026)))
    inputs = qkv(1026, 1, 2, 128, BF16)
    pools, want = poisoned(schedule, inputs[1], BF16), trained(schedule, inputs)
    assert torch.equal(follow(schedule, inputs, pools), want)
    monkeypatch.setattr(operator, "_DECODE_PROGRAMS", 0)
    again = replace(schedule, steps=schedule.steps[1:])
    assert torch.equal(follow(again, inputs, pools)[1022:], want[1022:])


def _other_tile(wrong: pytest.MonkeyPatch) -> None:
    """A cache with other tiles than training."""
    wrong.setattr(operator, "ROWS", {FP32: 16, BF16: 32})


def _other_segment(wrong: pytest.MonkeyPatch) -> None:
    wrong.setattr(operator, "SEGMENT", 64)


MISTAKES = [_other_segment] if ON_GPU else [_other_segment, _other_tile]  # a GPU may round all tiles alike


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, inputs = decoding(16, (0, 68), (68, 69), (69, 70)), qkv(70, 1, 4, 16)
    want = trained(schedule, inputs)
    assert torch.equal(follow(schedule, inputs, poisoned(schedule, inputs[1], FP32)), want)
    mistake(monkeypatch)
    assert not torch.equal(follow(schedule, inputs, poisoned(schedule, inputs[1], FP32)), want)


@pytest.mark.parametrize("path", [Path.TRITON, Path.CPU])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_fast_form(path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training with its gradients; and prefill in parts, then decode, from pools that others have left full."""
    monkeypatch.setattr("ops.dispatch._fast", frozenset())  # what use_fast sets ends with the test
    use_fast(["softmax_attention"])
    schedule = Schedule(
        16, [40, 19], [[(0, 0, 7)], [(1, 0, 18), (0, 7, 39)], [(0, 39, 40), (1, 18, 19)]], np.zeros(2),
        np.array([[4, 1, 0], [2, 5, 3]]),
    )  # fmt: skip
    inputs = qkv(59, 2, 2, 8, dtype)
    grad = torch.randn(inputs[0].shape).to(DEVICE)
    want = differentiate_fp64(lambda *x: ops.softmax_attention_reference(*x, schedule.lengths), inputs, grad)
    batch, close = layout(schedule.lengths, 16), {FP32: 1e-5, BF16: 5e-2}[dtype]
    pools = [torch.randn(9, 2, 16, 8).to(DEVICE, dtype) for _ in "kv"]
    with force(path):
        got = differentiate(lambda *x: ops.softmax_attention(*x, batch), inputs, grad)
        cached = follow(schedule, inputs, pools, no_block=0)
    for actual, expected in zip(
        (got.output, cached, *got.inputs), (want.output, want.output, *want.inputs), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=close, atol=close)


def test_users_mistake() -> None:
    with pytest.raises(ValueError, match="chunk_size 256: attention on a GPU takes 16 to 128"):
        ops.softmax_attention(*qkv(3, 1, 1, 16), layout([3], 256))
