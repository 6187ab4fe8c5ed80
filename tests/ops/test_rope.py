"""qk_norm_rope: norm of each head of q and k, then the first dimensions turn by the token's position."""

import math

import pytest
import torch

import ops
from tests.ops.checks import (
    ROWS,
    UNIT,
    assert_rows_do_not_depend_on_batch,
    assert_within,
    differentiate,
    differentiate_fp64,
)

THETA = 10000.0
EPS = 1e-6


def rope(x: torch.Tensor, table: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The rotation alone: no weights, and every head a query head."""
    return ops.qk_norm_rope(x, None, None, x.shape[1], table, position_ids, EPS)[0]


def test_hand_worked() -> None:
    """R = 4: the first pair (dimensions 0 and 2) turns by p, the second (1 and 3) by p / 100."""
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0, 7.0]]])
    y = rope(x, ops.rope_table(8, 4, THETA), torch.tensor([3]))
    expected = [math.cos(3), -2 * math.sin(0.03), math.sin(3), 2 * math.cos(0.03), 7.0]
    torch.testing.assert_close(y.flatten(), torch.tensor(expected))


def test_position_zero_moves_nothing() -> None:
    x = torch.randn(1, 3, 10)
    assert torch.equal(rope(x, ops.rope_table(1, 10, THETA), torch.tensor([0])), x)


@pytest.mark.parametrize(("rotary_dim", "dim"), [(2, 3), (6, 7), (16, 32), (32, 32)])
def test_output_and_gradient(rotary_dim: int, dim: int) -> None:
    """Sine and cosine are rounded once, each product once, their sum once: 3 u (|x1| + |x2|)."""
    x, grad, positions = torch.randn(9, 3, dim), torch.randn(9, 3, dim), torch.randint(0, 500, (9,))
    table = ops.rope_table(500, rotary_dim, THETA)
    got = differentiate(lambda x: rope(x, table, positions), (x,), grad)
    want = differentiate_fp64(lambda x: ops.rope_reference(x, positions, rotary_dim, THETA), (x,), grad)
    for actual, expected, source in ((got.output, want.output, x), (got.inputs[0], want.inputs[0], grad)):
        first, second = source[..., :rotary_dim].abs().chunk(2, dim=-1)
        bound = 3 * UNIT[torch.float32] * (first + second).repeat(1, 1, 2)
        assert_within(actual[..., :rotary_dim], expected[..., :rotary_dim], bound)
        assert torch.equal(actual[..., rotary_dim:], source[..., rotary_dim:])


def test_scores_depend_on_distance_only() -> None:
    q, k, table = torch.randn(1, 1, 16), torch.randn(1, 1, 16), ops.rope_table(100, 16, THETA)

    def score(i: int, j: int) -> float:
        return (rope(q, table, torch.tensor([i])) * rope(k, table, torch.tensor([j]))).sum().item()

    assert score(20, 13) == pytest.approx(score(97, 90), abs=1e-5)
    assert score(20, 13) != pytest.approx(score(20, 14), abs=1e-3)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rotary_dim", "dim"), [(6, 7), (16, 32)])
def test_row_bits_do_not_depend_on_the_batch(rotary_dim: int, dim: int) -> None:
    table, positions = ops.rope_table(4096, rotary_dim, THETA), torch.randint(0, 4096, (ROWS,))
    assert_rows_do_not_depend_on_batch(lambda x, p: (rope(x, table, p),), torch.randn(ROWS, 3, dim), positions)


def test_heads_are_normed_then_turned_and_values_pass() -> None:
    """Against the reference; the norm's own bounds are tested beside it."""
    qkv, weights, positions = torch.randn(9, 8, 16), torch.randn(2, 16), torch.randint(0, 500, (9,))
    q, k, v = ops.qk_norm_rope(qkv, *weights, 4, ops.rope_table(500, 8, THETA), positions, EPS)
    want = ops.qk_norm_rope_reference(qkv.double(), *weights.double(), 4, 2, positions, 8, THETA, EPS)
    for actual, expected in zip((q, k, v), want, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-6)
    assert torch.equal(v, qkv[:, 6:])
