"""lightning_attention in Triton: the recurrence, and one set of bits in training, prefill and decode.

Values that a test gives to BF16 operands are BF16 numbers, so what is measured is the operator's own rounding.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from ops import linear_attention
from ops.dispatch import Path, force, use_fast
from tests.ops.checks import UNIT, assert_within, differentiate, differentiate_fp64, magnitude
from tests.ops.kernels.harness import DEVICE, ON_GPU, adversarial, poison
from tests.ops.schedules import Schedule, schedules

BF16, FP32 = torch.bfloat16, torch.float32
# Fastest head of the first layer, slowest of the last but one, of 16 heads and 20 layers, under both readings
# of layer i's factor: 1 - (i - 1) / 19 + 1e-5 in the published modeling file, 1 - i / 19 + 1e-5 in the engines.
HF = 2**-0.5 * (1 + 1 / 19 + 1e-5), 2**-8 * (2 / 19 + 1e-5)
ENGINE = 2**-0.5 * (1 + 1e-5), 2**-8 * (1 / 19 + 1e-5)


def qkv(tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q and k in FP32, as RoPE leaves them, v in the working type; two heads."""
    q, k, v = (torch.randn(tokens, 2, dim).to(DEVICE, dtype) for _ in "qkv")
    return q.float(), k.float(), v


def tables(slopes: tuple[float, ...], chunk: int) -> ops.DecayTables:
    return ops.DecayTables.build(torch.tensor(slopes, dtype=torch.float64), chunk).to(DEVICE)


def layout(lengths: list[int], chunk: int, starts: list[int] | None = None) -> ops.ChunkLayout:
    return ops.ChunkLayout.build(lengths, chunk, starts, DEVICE)


def fp32_rounding(dim: int, length: int, chunk: int, slopes: tuple[float, ...]) -> float:
    """Chains of sums as on the CPU path. A power's exponent is rounded twice, and exp2 errs by 4 u; a term meets one
    power at either end and one for each chunk between."""
    powers = 2 * max(slopes) * length + 5 * (length / chunk + 2)
    return (2 * dim + length + 10 + powers) * UNIT[FP32]


@pytest.fixture
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    def like(x: Tensor, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return poison(*shape, dtype=dtype)

    monkeypatch.setattr(linear_attention, "like", like)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_hand_worked_recurrence(dtype: torch.dtype) -> None:
    """lambda = 1/2 and one channel of 16: S = 1*1, then 1/2 + 2*3, then 6.5/2 + 1*4; q is 1, 1, 2 and the scale 1/4."""
    q, k, v = (torch.zeros(3, 1, 16, device=DEVICE, dtype=dtype) for _ in "qkv")
    for x, values in ((q, [1, 1, 2]), (k, [1, 2, 1]), (v, [1, 3, 4])):
        x[:, 0, 0] = torch.tensor(values)
    o = ops.lightning_attention(q, k, v, tables((0.6931471805599453,), 16), layout([3], 16))
    want = torch.zeros(3, 1, 16)
    want[:, 0, 0] = torch.tensor([0.25, 1.625, 3.625])
    torch.testing.assert_close(o.cpu(), want)


@pytest.mark.usefixtures("poisoned_scratch")
@pytest.mark.parametrize("slopes", [HF, ENGINE], ids=["hf", "engine"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("lengths", "chunk", "dim"), [([17, 3, 70], 32, 32), ([1, 16, 33], 16, 16)])
def test_output_and_gradients(
    lengths: list[int], chunk: int, dim: int, dtype: torch.dtype, slopes: tuple[float, ...]
) -> None:
    """All terms are products, so errors scale with the sum of their absolute values. To BF16 are rounded: a score, or a
    value on its way into the state; for gradients also the state itself; the gradient of v is stored in it."""
    tokens, decay, batch = sum(lengths), tables(slopes, chunk), layout(lengths, chunk)
    inputs, grad = qkv(tokens, dim, dtype), torch.randn(tokens, 2, dim).to(DEVICE, dtype).float()
    rates = torch.tensor(slopes, dtype=torch.float64, device=DEVICE)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.lightning_attention_reference(q, k, v, rates, lengths)

    got = differentiate(lambda q, k, v: ops.lightning_attention(q, k, v, decay, batch), inputs, grad)
    want, size = differentiate_fp64(reference, inputs, grad), magnitude(reference, inputs, grad)
    rounding = fp32_rounding(dim, max(lengths), chunk, slopes)
    low = 0.0 if dtype == FP32 else UNIT[BF16] * (1 + 2**-6)  # second-order terms, and the state's two terms of BF16
    assert_within(got.output, want.output, (low + rounding) * size.output)
    for steps, actual, expected, absolute in zip((2, 2, 3), got.inputs, want.inputs, size.inputs, strict=True):
        assert_within(actual, expected, (steps * low + rounding) * absolute)


def test_production_tile_output() -> None:
    """d 128 and chunks of 64: several blocks of columns, of which a program computes one."""
    inputs, slopes = qkv(130, 128, BF16), (HF[0], ENGINE[1])
    rates = torch.tensor(slopes, dtype=torch.float64, device=DEVICE)
    want = ops.lightning_attention_reference(*(x.double() for x in inputs), rates, [130])
    size = ops.lightning_attention_reference(*(x.double().abs() for x in inputs), rates, [130])
    got = ops.lightning_attention(*inputs, tables(slopes, 64), layout([130], 64))
    assert_within(got, want, (UNIT[BF16] * (1 + 2**-6) + fp32_rounding(128, 130, 64, slopes)) * size)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bits_do_not_depend_on_packing(dtype: torch.dtype) -> None:
    """Nor do those of the gradients, which nobody is owed."""
    lengths, decay = [40, 1, 17, 16, 5], tables(HF, 16)
    inputs, grad = qkv(sum(lengths), 16, dtype), torch.randn(sum(lengths), 2, 16).to(DEVICE)

    def attend(order: list[int], seed: int) -> list[tuple[Tensor, ...]]:
        *chosen, incoming = (torch.cat([x.split(lengths)[s] for s in order]) for x in (*inputs, grad))
        batch = layout([lengths[s] for s in order], 16)
        with adversarial(seed):
            run = differentiate(lambda *qkv: ops.lightning_attention(*qkv, decay, batch), tuple(chosen), incoming)
        sizes = [lengths[s] for s in order]
        return list(zip(*(x.split(sizes) for x in (run.output, *run.inputs)), strict=True))

    together, shuffled = attend([0, 1, 2, 3, 4], 1), attend([3, 0, 4, 2, 1], 2)
    for s, place in ((0, 1), (1, 4), (2, 3)):
        alone = attend([s], s + 3)[0]
        assert all(torch.equal(a, b) for a, b in zip(together[s], alone, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(shuffled[place], alone, strict=True))


def test_inputs_may_be_parts_of_one_tensor() -> None:
    """As the fused projection leaves them: every token's heads are dense, tokens are not. Or heads before tokens."""
    packed, decay, batch = torch.randn(20, 6, 16).to(DEVICE, BF16), tables(HF, 16), layout([20], 16)
    grad = torch.randn(20, 2, 16).to(DEVICE)
    results = []
    for leaf in (packed, packed.transpose(0, 1).contiguous().transpose(0, 1)):
        leaf.requires_grad_()
        o = ops.lightning_attention(*leaf.split(2, dim=1), decay, batch)
        results.append((o, *torch.autograd.grad(o, leaf, grad)))
    parts = tuple(x.detach().contiguous() for x in packed.split(2, dim=1))
    whole = differentiate(lambda *qkv: ops.lightning_attention(*qkv, decay, batch), parts, grad)
    for o, gradient in results:
        assert torch.equal(o, whole.output)
        assert torch.equal(gradient, torch.cat(whole.inputs, dim=1))


def follow(
    schedule: Schedule, inputs: tuple[Tensor, ...], decay: ops.DecayTables, pool_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output and final states of a schedule. Whatever nobody has written is NaN, and programs run in another order in
    every step."""
    heads, dim = inputs[0].shape[1:]
    state = poison(schedule.pool_slots, heads, dim, dim)
    state[schedule.slots] = 0.0
    pools = [poison(schedule.pool_slots, heads, schedule.chunk_size, dim, dtype=pool_dtype) for _ in "kv"]
    out = poison(*inputs[0].shape)
    for number, step in enumerate(schedule.steps):
        tokens = schedule.tokens(step).to(DEVICE)
        slots = torch.tensor([schedule.slots[s] for s, _, _ in step], device=DEVICE)
        starts = [begin for _, begin, _ in step]
        batch = layout([end - begin for _, begin, end in step], schedule.chunk_size, starts)
        cache = ops.LightningCache(state, *pools, slots)
        with adversarial(number + 2):
            out[tokens] = ops.lightning_attention(*(x[tokens] for x in inputs), decay, batch, cache)
    return out, state


def trained(schedule: Schedule, inputs: tuple[Tensor, ...], decay: ops.DecayTables) -> Tensor:
    with adversarial(1):
        return ops.lightning_attention(*inputs, decay, layout(schedule.lengths, schedule.chunk_size))


@given(schedules(max_sequences=2), st.sampled_from([(FP32, FP32), (BF16, BF16), (BF16, FP32)]))
@settings(max_examples=8)
def test_decode_is_prefill_is_training(schedule: Schedule, types: tuple[torch.dtype, torch.dtype]) -> None:
    """Types of v and of the pools."""
    inputs, decay = qkv(sum(schedule.lengths), 16, types[0]), tables(HF, schedule.chunk_size)
    out, state = follow(schedule, inputs, decay, types[1])
    assert torch.equal(out, trained(schedule, inputs, decay))
    unused = sorted(set(range(schedule.pool_slots)) - set(schedule.slots.tolist()))
    assert state[unused].isnan().all()


def decoding(*pieces: tuple[int, int]) -> Schedule:
    """One sequence, cut as given."""
    steps = [[(0, begin, end)] for begin, end in pieces]
    slots = torch.tensor([1]).numpy()
    return Schedule(64, [pieces[-1][1]], steps, slots, slots[None])


@pytest.mark.usefixtures("poisoned_scratch")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_production_tile_decode(dtype: torch.dtype) -> None:
    schedule = decoding((0, 40), (40, 64), (64, 126), (126, 127), (127, 128), (128, 129))
    inputs, decay = qkv(129, 128, dtype), tables(ENGINE, 64)
    out, _ = follow(schedule, inputs, decay, dtype)
    assert torch.equal(out, trained(schedule, inputs, decay))


def test_state_is_written_once_per_chunk() -> None:
    """Up to 63 tokens leave the state alone; the 64th writes what training has in front of the next tile."""
    inputs, decay = qkv(65, 16, FP32), tables(HF, 64)
    _, state = follow(decoding((0, 30), (30, 63)), tuple(x[:63] for x in inputs), decay, FP32)
    assert torch.equal(state[1], torch.zeros_like(state[1]))
    with adversarial(1):
        before = linear_attention._triton_states(inputs[1], inputs[2], decay, layout([65], 64), FP32, 1)
    for pieces in (((0, 64),), ((0, 30), (30, 64)), ((0, 63), (63, 64))):
        _, state = follow(decoding(*pieces), tuple(x[:64] for x in inputs), decay, FP32)
        assert torch.equal(state[1], before[1, :, 0])


def _narrower_decode(wrong: pytest.MonkeyPatch) -> None:
    """Decode with other tiles than training."""
    tiling = linear_attention._tiling
    decode = linear_attention._triton_decode

    def narrower(*arguments: object) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear_attention, "_tiling", lambda *a: tiling(*a) | {"BLOCK": 16})
            return decode(*arguments)

    wrong.setattr(linear_attention, "_triton_decode", narrower)


def _rounded_state(wrong: pytest.MonkeyPatch) -> None:
    """A cache that keeps the state in BF16."""
    cached = linear_attention._triton_cached

    def rounded(*arguments: ops.LightningCache) -> Tensor:
        out = cached(*arguments)
        arguments[-1].state.copy_(arguments[-1].state.bfloat16())
        return out

    wrong.setattr(linear_attention, "_triton_cached", rounded)


MISTAKES = [_rounded_state] if ON_GPU else [_rounded_state, _narrower_decode]  # a GPU may round all widths alike


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = decoding((0, 64), (64, 66), (66, 67), (67, 68))
    inputs, decay = qkv(68, 32, BF16), tables(ENGINE, 64)
    mistake(monkeypatch)
    out, _ = follow(schedule, inputs, decay, BF16)
    assert not torch.equal(out, trained(schedule, inputs, decay))


@pytest.mark.parametrize("path", [Path.TRITON, Path.CPU])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_fast_form_is_the_recurrence(path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill in two parts, then decode, beside a second sequence; nothing is rounded to BF16, and the open chunk stays
    unread and unwritten. One sum over the state, one over time, and ten single steps."""
    monkeypatch.setattr("ops.dispatch._fast", frozenset())  # what use_fast sets ends with the test
    use_fast(["lightning_attention"])
    lengths, slopes, dim = [20, 19], HF, 32
    steps = [[(0, 0, 7)], [(1, 0, 18), (0, 7, 18)], [(0, 18, 19), (1, 18, 19)], [(0, 19, 20)]]
    schedule = Schedule(16, lengths, steps, torch.tensor([2, 0]).numpy(), torch.zeros(2, 1).numpy())
    inputs, decay = qkv(39, dim, dtype), tables(slopes, 16)
    rates = torch.tensor(slopes, dtype=torch.float64, device=DEVICE)
    want = ops.lightning_attention_reference(*(x.double() for x in inputs), rates, lengths)
    size = ops.lightning_attention_reference(*(x.double().abs() for x in inputs), rates, lengths)
    with force(path):
        out, state = follow(schedule, inputs, decay, dtype)
    assert_within(out, want, (dim + 2 * 20 + 10 + 5 * 20) * UNIT[FP32] * size)
    assert not state[[0, 2]].isnan().any()


def test_users_mistakes() -> None:
    inputs, decay = qkv(3, 24, BF16), tables(HF, 16)
    with pytest.raises(ValueError, match="head dimension 24 with chunks of 16"):
        ops.lightning_attention(*inputs, decay, layout([3], 16))
    inputs = qkv(3, 16, FP32)
    cache = ops.LightningCache(poison(1, 2, 16, 16), *(poison(1, 2, 16, 16, dtype=BF16) for _ in "kv"), torch.arange(1))
    with pytest.raises(ValueError, match="make the cache float32"):
        ops.lightning_attention(*inputs, decay, layout([3], 16), cache)


def test_tables_move_to_a_device() -> None:
    moved = ops.DecayTables.build(torch.tensor(HF, dtype=torch.float64), 16).to(torch.device("meta"))
    assert {x.device.type for x in vars(moved).values()} == {"meta"}
