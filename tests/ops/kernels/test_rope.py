"""qk_norm_rope in Triton: every output and gradient, rows alone, and agreement with the CPU path."""

import pytest
import torch
from torch import Tensor

import ops
from ops.dispatch import Path, force
from tests.ops.checks import UNIT, assert_within
from tests.ops.kernels.harness import DEVICE, adversarial, assert_rows_alone

EPS, THETA, HEADS, KV_HEADS = 1e-6, 10000.0, 3, 2
U = UNIT[torch.float32]


def inputs(tokens: int, dim: int, rotary_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, dim).to(DEVICE, dtype)
    weights = torch.randn(2, dim).to(DEVICE)
    table = ops.rope_table(500, rotary_dim, THETA).to(DEVICE)
    return qkv, weights[0], weights[1], table, torch.randint(0, 500, (tokens,)).to(DEVICE)


def turn(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, table: Tensor, positions: Tensor) -> Tensor:
    return torch.cat(ops.qk_norm_rope(qkv, q_weight, k_weight, HEADS, table, positions, EPS), dim=1)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("rotary_dim", "dim"), [(6, 7), (16, 32), (32, 32)])
def test_output_and_gradients(rotary_dim: int, dim: int, normed: bool) -> None:
    """rms_norm's error on both partners, (D/2 + 8) u, then 3 u for the rotation; the way back adds the norm's
    (3 D + 24) u to those 3 u. All against the sum of absolute terms, of which the largest row element bounds each."""
    qkv, q_weight, k_weight, table, positions = inputs(21, dim, rotary_dim)
    weights = (q_weight, k_weight) if normed else ()
    leaves = [x.clone().requires_grad_() for x in (qkv, *weights)]
    doubles = [x.double().cpu().requires_grad_() for x in (qkv, *weights)]
    got = turn(leaves[0], *(leaves[1:] or (None, None)), table, positions)
    reference = ops.qk_norm_rope_reference(
        doubles[0], *(doubles[1:] or (None, None)), HEADS, KV_HEADS, positions.cpu(), rotary_dim, THETA, EPS
    )
    want, grad = torch.cat(reference, dim=1), torch.randn_like(got)
    rows = want.detach().abs().amax(-1, keepdim=True)
    assert_within(got.cpu(), want.detach(), (dim / 2 + 11) * U * 2 * rows)
    mine = torch.autograd.grad(got, leaves, grad)
    theirs = torch.autograd.grad(want, doubles, grad.double().cpu())
    scale = theirs[0].abs().amax(-1, keepdim=True) + 1
    assert_within(mine[0].cpu(), theirs[0], (3 * dim + 27) * U * 2 * scale)
    for actual, expected in zip(mine[1:], theirs[1:], strict=True):
        assert_within(actual.cpu(), expected, (21 * HEADS + dim + 20) * U * 21 * HEADS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_bits_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    qkv, q_weight, k_weight, table, positions = inputs(70, 16, 8, dtype)
    assert_rows_alone(lambda x, p: (turn(x, q_weight, k_weight, table, p),), [qkv, positions])


def test_the_same_numbers_as_the_cpu_path() -> None:
    arguments = inputs(33, 32, 16)
    with force(Path.CPU):
        want = turn(*(x.cpu() for x in arguments))
    torch.testing.assert_close(turn(*arguments).cpu(), want, rtol=1e-5, atol=1e-6)


def test_gradient_bits_do_not_depend_on_the_order_of_programs() -> None:
    qkv, q_weight, k_weight, table, positions = inputs(300, 64, 32)
    results = []
    for seed in (1, 2):
        leaves = [x.clone().requires_grad_() for x in (qkv, q_weight, k_weight)]
        with adversarial(seed):
            results.append(torch.autograd.grad(turn(*leaves, table, positions).square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
