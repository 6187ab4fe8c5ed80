"""experts in Triton: where rows go, every output and gradient, rows alone, FP8."""

import sys

import pytest
import torch
from torch import Tensor

import ops
from ops.dispatch import Path, force
from ops.experts import _ROWS, _plan
from tests.ops.checks import UNIT, assert_within, differentiate, differentiate_fp64, magnitude
from tests.ops.kernels.harness import DEVICE, adversarial, assert_rows_alone

DTYPES = [torch.float32, torch.bfloat16]
U = UNIT[torch.float32]


def routed(tokens: int, experts: int, top_k: int, idle: int) -> Tensor:
    """Ascending ids of all experts but `idle`."""
    others = torch.tensor([e for e in range(experts) if e != idle])
    return torch.stack([others[torch.randperm(len(others))[:top_k]].sort().values for _ in range(tokens)])


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 6, 3), (70, 6, 3), (130, 40, 2)])
def test_rows_are_sorted_by_expert_and_padded_to_tiles(tokens: int, experts: int, top_k: int) -> None:
    ids = routed(tokens, experts, top_k, idle=4)
    plan = _plan(ids.to(DEVICE), experts)
    source, place, tiles = plan.source.cpu(), plan.place.cpu(), plan.tile_expert.cpu()
    rows: list[int] = []
    owners: list[int] = []
    for expert in range(experts):
        members = [t for t in range(tokens) if expert in ids[t]]
        assert plan.begin[expert] == len(rows) and plan.used[expert] == len(members)
        padding = -len(members) % _ROWS
        rows += members + [-1] * padding
        owners += [expert] * ((len(members) + padding) // _ROWS)
    assert source.tolist() == rows + [-1] * (len(source) - len(rows))
    assert tiles.tolist() == owners + [-1] * (len(tiles) - len(owners))
    for token in range(tokens):
        for slot in range(top_k):
            assert source[place[token, slot]] == token
            assert tiles[place[token, slot] // _ROWS] == ids[token, slot]


def made(tokens: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """ids of 6 experts, expert 4 idle; x, gate_up, down representable in dtype, weights."""
    dim, width = 19, 7
    x, gate_up, down = torch.randn(tokens, dim), torch.randn(6, 2 * width, dim), torch.randn(6, dim, width)
    rounded = (t.to(dtype).float() for t in (x, gate_up / dim**0.5, down / width**0.5))
    return routed(tokens, 6, 3, idle=4), (*rounded, torch.rand(tokens, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_reference(dtype: torch.dtype) -> None:
    """The bound of the CPU path, in tests/ops/test_experts.py."""
    ids, inputs = made(21, dtype)
    x, gate_up = inputs[:2]
    grad = torch.randn_like(x).to(dtype).float()

    def run(*arguments: Tensor) -> Tensor:
        x, gate_up, down, weights = (a.to(DEVICE) for a in arguments)
        return ops.experts(x, gate_up, down, ids.to(DEVICE), weights, dtype).cpu()

    def reference(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        return ops.experts_reference(x, gate_up, down, ids, weights)

    got = differentiate(run, inputs, grad)
    want, size = differentiate_fp64(reference, inputs, grad), magnitude(reference, inputs, grad)
    steps = (2 * x.shape[1] + 7 + 3 + len(x) + 20) * U + (8 * UNIT[dtype] if dtype == torch.bfloat16 else 0.0)
    gate = torch.einsum("tk,efk->tef", x.abs(), gate_up.abs()).max().item()
    for actual, expected, absolute in zip(
        (got.output, *got.inputs), (want.output, *want.inputs), (size.output, *size.inputs), strict=True
    ):
        assert_within(actual, expected, 2.2 * (1 + gate) * steps * absolute)
    assert got.inputs[1][4].count_nonzero() == 0  # the idle expert


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_of_a_token_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    ids, (x, gate_up, down, weights) = made(140, dtype)
    gate_up, down = gate_up.to(DEVICE), down.to(DEVICE)
    run = lambda x, i, w: (ops.experts(x, gate_up, down, i, w, dtype),)  # noqa: E731
    assert_rows_alone(run, [t.to(DEVICE) for t in (x, ids, weights)], counts=(1, 64, 101))


def test_gradient_bits_do_not_depend_on_the_order_of_programs() -> None:
    ids, inputs = made(70, torch.float32)
    results = []
    for seed in (1, 2):
        leaves = [t.to(DEVICE).requires_grad_() for t in inputs]
        with adversarial(seed):
            y = ops.experts(*leaves[:3], ids.to(DEVICE), leaves[3], torch.float32)
            results.append(torch.autograd.grad(y.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sum_runs_in_ascending_expert_order() -> None:
    """As on the CPU path: each expert returns exactly 1.25, which FP32 loses next to 1.25 * 2^25."""
    gate_up = torch.tensor([[[40.0], [1.0]]]).repeat(3, 1, 1).to(DEVICE)
    down, ids = torch.full((3, 1, 1), 1 / 32).to(DEVICE), torch.tensor([[0, 1, 2]]).to(DEVICE)
    for weights, total in (([2.0**25, -(2.0**25), 1.0], 1.25), ([1.0, 2.0**25, -(2.0**25)], 0.0)):
        weight = torch.tensor([weights]).to(DEVICE)
        y = ops.experts(torch.ones(1, 1).to(DEVICE), gate_up, down, ids, weight, torch.float32)
        assert y.item() == total


def fp8_made(tokens: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    x, gate_up, down = torch.randn(tokens, 128), torch.randn(4, 256, 128) / 11, torch.randn(4, 128, 128) / 11
    return routed(tokens, 4, 2, idle=3), (x, gate_up, down, torch.rand(tokens, 2))


def test_fp8_is_the_product_of_what_was_quantised() -> None:
    """Against the CPU path, which multiplies the same e4m3 values: both round to BF16 twice (2^-8 each), and a hidden
    value on the edge of two e4m3 values may fall to the other side, 2^-3 of it. Held by the mean, and loosely by the
    largest error."""
    ids, (x, gate_up, down, weights) = fp8_made(70)

    def run(*tensors: Tensor) -> Tensor:
        x, gate_up, down, weights, ids = tensors
        stacked = (ops.quantize_weight(w.flatten(0, 1)) for w in (gate_up, down))
        return ops.fp8_experts(x, *stacked, ids, weights, 4)

    got = run(*(t.to(DEVICE) for t in (x, gate_up, down, weights, ids))).cpu()
    with force(Path.CPU):
        want = run(x, gate_up, down, weights, ids)
        exact = ops.experts_reference(x, gate_up, down, ids, weights)
    size = want.abs().mean()
    assert (got - want).abs().mean() < 2.0**-8 * size
    assert (got - want).abs().max() < 2.0**-3 * size
    assert 2.0**-8 * size < (got - exact).abs().mean() < 2.0**-3 * size


def test_fp8_output_of_a_token_does_not_depend_on_its_batch() -> None:
    ids, (x, gate_up, down, weights) = fp8_made(90)
    stacked = [ops.quantize_weight(w.flatten(0, 1).to(DEVICE)) for w in (gate_up, down)]
    run = lambda x, i, w: (ops.fp8_experts(x, *stacked, i, w, 4),)  # noqa: E731
    assert_rows_alone(run, [t.to(DEVICE) for t in (x, ids, weights)], counts=(1, 17, 64))


def test_padding_rows_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that kernels are given is full of NaN, and no NaN comes out."""
    ids, (x, gate_up, down, weights) = fp8_made(5)
    stacked = [ops.quantize_weight(w.flatten(0, 1).to(DEVICE)) for w in (gate_up, down)]
    module = sys.modules["ops.experts"]
    plain = module.like

    def poisoned(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        y = plain(x, *shape, dtype=dtype)
        return y.fill_(float("nan")) if dtype.is_floating_point and dtype.itemsize > 1 else y

    arguments = [t.to(DEVICE) for t in (x, ids, weights)]
    want = ops.fp8_experts(arguments[0], *stacked, *arguments[1:], 4)
    monkeypatch.setattr(module, "like", poisoned)
    assert torch.equal(ops.fp8_experts(arguments[0], *stacked, *arguments[1:], 4), want)
    y = ops.experts(arguments[0], gate_up.to(DEVICE), down.to(DEVICE), *arguments[1:], torch.bfloat16)
    assert bool(torch.isfinite(y).all())


def test_fp8_refuses_blocks_that_span_two_experts() -> None:
    stacked = ops.quantize_weight(torch.randn(4 * 96, 128).to(DEVICE))
    with pytest.raises(ValueError, match="multiples of 128"):
        ops.fp8_experts(torch.randn(1, 128).to(DEVICE), stacked, stacked, torch.zeros(1, 1), torch.ones(1, 1), 4)
