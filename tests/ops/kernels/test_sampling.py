"""sample in Triton: the walk of the CPU path, whatever the batch; its log-probs are the trainer's."""

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from tests.ops.kernels.harness import DEVICE, assert_rows_alone, poison

IMPLEMENTATION = importlib.import_module("ops.sampling")
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a test takes several blocks, as a vocabulary does."""
    monkeypatch.setattr(IMPLEMENTATION, "_BLOCK", 16)


def draw(rows: Tensor, uniform: list[float], top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> list[int]:
    """Tokens drawn from rows of log-probs [B, V], which NaN surrounds in memory."""
    batch, vocabulary = rows.shape
    memory = poison(batch + 2, vocabulary)
    memory[:batch] = rows
    limits = (torch.full((batch,), value, device=DEVICE) for value in (1.0, top_p, top_k, min_p))
    tokens, _ = IMPLEMENTATION._triton_draw(
        memory[:batch], *limits, torch.tensor(uniform, dtype=torch.float64, device=DEVICE)
    )
    return tokens.tolist()


def log(*probabilities: float) -> Tensor:
    """A row; with 20 impossible tokens before and after, so that it lies in two blocks."""
    row = torch.tensor([[0.0] * 14 + list(probabilities) + [0.0] * 14], device=DEVICE)
    return row.log()


@pytest.mark.parametrize(
    ("top_p", "top_k", "min_p", "expected"),
    [
        (1.0, 0, 0.0, 3),  # 0.95 of 1: cumulative 0.5, 0.75, 0.875, 1
        (0.6, 0, 0.0, 1),  # two tokens reach 0.6: 0.95 of 0.75 lies in the second
        (0.75, 0, 0.0, 1),  # two reach 0.75, exactly
        (0.76, 0, 0.0, 2),  # the third, and not the fourth, though they are equal
        (0.9, 0, 0.0, 3),
        (0.01, 0, 0.0, 0),  # the first is always kept
        (0.0, 0, 0.0, 0),
        (1.0, 3, 0.0, 2),  # the lower of two equals
        (1.0, 1, 0.0, 0),
        (1.0, 99, 0.0, 3),  # more than there are
        (0.8, 2, 0.0, 1),  # both limits: the tighter wins
        (1.0, 0, 0.25, 3),
        (1.0, 0, 0.26, 1),
        (1.0, 0, 2.0, 0),  # the first is always kept
        (0.6, 0, 0.25, 1),
    ],
)
def test_limits(top_p: float, top_k: int, min_p: float, expected: int) -> None:
    assert draw(log(0.5, 0.25, 0.125, 0.125), [0.95], top_p, top_k, min_p) == [14 + expected]


def test_limits_keep_the_order_of_the_vocabulary() -> None:
    """Kept are 2 (0.5) and 0 (0.3): the walk meets 0 first. Of three equals, the first two."""
    assert draw(log(0.3, 0.2, 0.5).repeat(2, 1), [0.37, 0.38], top_k=2) == [14, 16]
    assert draw(log(0.1, 0.3, 0.3, 0.3).repeat(2, 1), [0.49, 0.99], top_k=2) == [15, 16]


def test_cumulative_distribution_is_walked_in_order() -> None:
    """A token of probability zero is never drawn, not even by the ends of the unit interval."""
    uniform = [0.0, 0.24, 0.26, 0.51, 1 - 2**-53]
    assert draw(log(0.0, 0.25, 0.25, 0.5, 0.0).repeat(5, 1), uniform) == [15, 15, 16, 17, 17]


def test_a_row_of_nan_names_a_token() -> None:
    """Nothing good can be drawn, but the caller indexes with it."""
    rows = poison(1, 40)
    ones = torch.ones(1, device=DEVICE)
    for top_p in (1.0, 0.5):
        limits = (ones, ones * top_p, ones.long() * 0, ones * 0)
        assert 0 <= IMPLEMENTATION._triton_draw(rows, *limits, ones.double() / 2)[0].item() < 40


@settings(max_examples=4)
@given(st.integers(0, 2**32), st.integers(1, 50), st.integers(0, 4))
def test_draws_agree_with_the_cpu_path(seed: int, vocabulary: int, top_k: int) -> None:
    """Any limits; but for a number on the edge of a token, where two roundings may differ."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.log_softmax(3 * torch.randn(4, vocabulary, generator=generator), dim=-1)
    uniform = torch.rand(4, generator=generator, dtype=torch.float64)
    top_k_of_rows = torch.tensor([0, top_k, 0, top_k])
    limits = torch.ones(4), torch.tensor([1.0, 0.3, 0.9, 1.0]), top_k_of_rows, torch.tensor([0.0, 0.0, 0.1, 0.2])
    tokens, processed = IMPLEMENTATION._triton_draw(rows.to(DEVICE), *(x.to(DEVICE) for x in (*limits, uniform)))
    possible = [IMPLEMENTATION._cpu_limited(rows, *limits, (uniform + e).clamp(0, 1))[0] for e in (-1e-6, 0.0, 1e-6)]
    assert torch.stack([tokens.cpu() == expected for expected in possible]).any(0).all()
    same, reference = IMPLEMENTATION._cpu_limited(rows, *limits, uniform)
    agree = tokens.cpu() == same
    # A sum in FP64 of FP32 terms, and a logarithm of at most 16 in FP32: a few units in its last place.
    torch.testing.assert_close(processed.cpu()[agree], reference[agree], rtol=0, atol=4 * 16 * 2**-24)
    assert tokens[0].item() in {ops.sample_reference(rows[0], uniform[0].item() + e) for e in (-1e-6, 0.0, 1e-6)}


def test_distribution() -> None:
    """Chi-square with 3 degrees of freedom exceeds 16.27 once in a thousand seeds; this seed is fixed."""
    draws, weights = 120, np.array([0.1, 0.2, 0.3, 0.4])
    address = np.stack([np.arange(draws), np.zeros(draws), np.full(draws, 7), np.ones(draws)]).astype(np.uint32)
    uniform = ops.addressed_uniform(11, address).tolist()
    tokens = draw(torch.tensor([weights.tolist()]).log().to(DEVICE).repeat(draws, 1), uniform)
    expected = draws * weights
    assert ((np.bincount(tokens, minlength=4) - expected) ** 2 / expected).sum() < 16.27


def test_greedy_takes_the_lowest_of_the_most_likely_at_temperature_one() -> None:
    """Equals in two blocks of the vocabulary."""
    hidden, logits = torch.ones(1, 1, device=DEVICE), torch.zeros(40)
    logits[[13, 20, 37]] = 3.0
    zero, one = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    arguments = zero, one, zero.long(), zero, torch.tensor([0.999], dtype=torch.float64, device=DEVICE)
    token, log_prob, _, _ = ops.sample(hidden, logits[:, None].to(DEVICE), *arguments, FP32)
    assert token.item() == 13
    assert log_prob.item() == pytest.approx(-math.log(3 + 37 * math.exp(-3)))


def made(rows: int) -> tuple[Tensor, list[Tensor]]:
    """weight; hidden, temperature, top_p, top_k, min_p, uniform of every kind of row."""
    row = torch.arange(rows)
    settings = [
        torch.randn(rows, 8),
        torch.tensor([0.0, 0.6, 1.0])[row % 3],
        torch.tensor([1.0, 0.8])[row % 2],
        torch.tensor([0, 0, 3, 0, 1])[row % 5],
        torch.tensor([0.0, 0.0, 0.1, 0.9])[row % 4],
        torch.rand(rows, dtype=torch.float64),
    ]
    return torch.randn(40, 8).to(DEVICE), [x.to(DEVICE) for x in settings]


def test_draw_does_not_depend_on_the_batch() -> None:
    weight, rows = made(10)
    assert_rows_alone(lambda h, *s: ops.sample(h, weight, *s, BF16), rows, counts=(1, 3))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_recorded_log_prob_is_the_trainers(dtype: torch.dtype) -> None:
    """Before any limit, at the row's temperature; a greedy row is recorded at temperature 1. Stock torch, by contrast,
    has other bits."""
    weight, (hidden, temperature, *others) = made(10)
    tokens, log_probs, rows, _ = ops.sample(hidden, weight, temperature, *others, dtype)
    assert torch.equal(rows.gather(1, tokens[:, None]).squeeze(1), log_probs)
    own = torch.where(temperature == 0, 1.0, temperature)
    assert torch.equal(ops.log_probs(hidden, weight, tokens, own, dtype)[0], log_probs)
    logits = hidden.to(dtype).float() @ weight.to(dtype).float().t()
    assert not torch.equal((logits / own[:, None]).log_softmax(-1), rows)
