"""sample: the right distribution, from numbers that belong to the token and not to the batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ops
from ops.log_probs import VOCAB_BLOCK

FP32 = torch.float32


def draw(
    probabilities: list[list[float]],
    uniform: list[float],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> list[int]:
    """Rows with the given probabilities, made by a one-hot hidden state for each row."""
    rows = len(probabilities)
    weight = torch.tensor(probabilities).log().clamp(min=-1000.0).t().contiguous()
    settings = (torch.full((rows,), value) for value in (temperature, top_p, top_k, min_p))
    return ops.sample(torch.eye(rows), weight, *settings, torch.tensor(uniform, dtype=torch.float64), FP32)[0].tolist()


def made(rows: int, vocabulary: int = 17, dim: int = 8) -> tuple[Tensor, ...]:
    """hidden, weight, temperature, top_p, top_k, min_p, uniform of a batch with every kind of row."""
    return (
        torch.randn(rows, dim),
        torch.randn(vocabulary, dim),
        torch.tensor([0.0, 0.6, 1.0])[torch.arange(rows) % 3],
        torch.tensor([1.0, 0.8])[torch.arange(rows) % 2],
        torch.tensor([0, 0, 3, 0, 1])[torch.arange(rows) % 5],
        torch.tensor([0.0, 0.0, 0.1, 0.9])[torch.arange(rows) % 4],
        torch.rand(rows, dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: int, expected: list[int]) -> None:
    """The vectors that Random123 publishes for philox4x32-10."""
    counters = np.array([counter, [1, 2, 3, 4]], dtype=np.uint32).T
    assert ops.philox(key, counters)[:, 0].tolist() == expected


def test_uniform_is_the_first_word_of_the_address() -> None:
    address = np.array([[0x243F6A88], [0x85A308D3], [0x13198A2E], [0x03707344]], dtype=np.uint32)
    uniform = ops.addressed_uniform(0x299F31D0A4093822, address)
    assert uniform.dtype == torch.float64
    assert uniform.tolist() == [0xD16CFE09 / 2**32]


def test_uniform_depends_on_its_own_address_only() -> None:
    addresses = np.random.default_rng(0).integers(0, 2**32, (4, 50), dtype=np.uint32)
    together = ops.addressed_uniform(3, addresses)
    assert torch.equal(ops.addressed_uniform(3, addresses[:, ::-1]).flip(0), together)
    assert torch.equal(torch.cat([ops.addressed_uniform(3, addresses[:, i : i + 1]) for i in range(50)]), together)
    assert len(set(together.tolist())) == 50
    for row in range(4):
        moved = addresses.copy()
        moved[row] ^= 1
        assert not (ops.addressed_uniform(3, moved) == together).any()
    assert not (ops.addressed_uniform(4, addresses) == together).any()


def test_distribution() -> None:
    """Chi-square with 7 degrees of freedom exceeds 24.32 once in a thousand seeds; this seed is fixed."""
    draws, weights = 20_000, np.array([1, 2, 3, 4, 10, 20, 30, 30]) / 100
    address = np.stack([np.arange(draws), np.zeros(draws), np.full(draws, 7), np.ones(draws)]).astype(np.uint32)
    uniform = ops.addressed_uniform(11, address)
    ones = torch.ones(draws)
    weight = torch.from_numpy(np.log(weights)).float()[:, None]
    tokens = ops.sample(
        ones[:, None], weight, ones, ones, torch.zeros(draws, dtype=torch.long), 0 * ones, uniform, FP32
    )[0]
    expected = draws * weights
    assert ((np.bincount(tokens.numpy(), minlength=8) - expected) ** 2 / expected).sum() < 24.32


@given(st.integers(0, 2**32), st.floats(0.0, 1.0, exclude_max=True), st.floats(0.1, 3.0))
def test_row_equals_reference(seed: int, uniform: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(29, 8, generator=generator)
    settings = torch.full((3,), temperature), torch.ones(3), torch.zeros(3, dtype=torch.long), torch.zeros(3)
    tokens, _, rows, _ = ops.sample(hidden, weight, *settings, torch.full((3,), uniform, dtype=torch.float64), FP32)
    # Two routines for exp, each within 2^-22, put the borders between tokens less than 1e-6 apart.
    for token, row in zip(tokens.tolist(), rows, strict=True):
        assert ops.sample_reference(row, uniform - 1e-6) <= token <= ops.sample_reference(row, uniform + 1e-6)


def test_cumulative_distribution_is_walked_in_order() -> None:
    """A token of probability zero is never drawn, not even by the ends of the unit interval."""
    rows = [[0.0, 0.25, 0.25, 0.5, 0.0]] * 5
    assert draw(rows, [0.0, 0.24, 0.26, 0.51, 1 - 2**-32]) == [1, 1, 2, 3, 3]


@pytest.mark.parametrize("vocabulary", [256, 257, 700])
def test_the_walk_finds_its_token_in_every_run(vocabulary: int) -> None:
    """Equal weights: the draw u is token floor(u V), whatever runs it is summed in."""
    tokens = torch.arange(vocabulary)
    uniform = (tokens.double() + 0.5) / vocabulary
    ones, zeros = torch.ones(vocabulary), torch.zeros(vocabulary)
    drawn = ops.sample(ones[:, None], torch.zeros(vocabulary, 1), ones, ones, zeros.long(), zeros, uniform, FP32)[0]
    assert torch.equal(drawn, tokens)


def test_greedy_takes_the_lowest_of_the_most_likely_at_temperature_one() -> None:
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [3.0], [3.0], [0.0]])
    settings = torch.zeros(1), torch.ones(1), torch.zeros(1, dtype=torch.long), torch.zeros(1)
    token, log_prob, _, processed = ops.sample(
        hidden, weight, *settings, torch.tensor([0.999], dtype=torch.float64), FP32
    )
    assert processed.item() == 0.0
    assert token.item() == 1
    assert log_prob.item() == pytest.approx(-math.log(2 + math.exp(-2) + math.exp(-3)))


@pytest.mark.parametrize(
    ("top_p", "top_k", "expected"),
    [
        (1.0, 0, 3),  # 0.95 of 1: cumulative 0.5, 0.75, 0.9, 1
        (0.6, 0, 1),  # two tokens reach 0.6: 0.95 of 0.75 lies in the second
        (0.8, 0, 2),  # three reach 0.8: 0.95 of 0.9
        (0.01, 0, 0),  # the first is always kept
        (1.0, 3, 2),
        (1.0, 1, 0),
        (1.0, 9, 3),  # more than there are
        (0.8, 2, 1),  # both limits: the tighter wins
    ],
)
def test_top_p_and_top_k(top_p: float, top_k: int, expected: int) -> None:
    assert draw([[0.5, 0.25, 0.15, 0.1]], [0.95], top_p=top_p, top_k=top_k) == [expected]


@pytest.mark.parametrize(
    ("min_p", "top_p", "top_k", "expected"),
    [
        (0.0, 1.0, 0, 3),
        (0.25, 1.0, 0, 2),  # at least 0.125: three, 0.95 of 0.9
        (0.5, 1.0, 0, 1),  # at least 0.25, which 0.25 is
        (0.51, 1.0, 0, 0),
        (1.0, 1.0, 0, 0),
        (0.25, 0.6, 0, 1),  # the tighter wins
        (0.25, 1.0, 1, 0),
    ],
)
def test_min_p(min_p: float, top_p: float, top_k: int, expected: int) -> None:
    assert draw([[0.5, 0.25, 0.15, 0.1]], [0.95], top_p=top_p, top_k=top_k, min_p=min_p) == [expected]


def test_limits_are_measured_on_one_distribution() -> None:
    """0.4 does not reach half of the whole, so 0.3 stays; of the two that the top 2 leave it would be 0.57 and do."""
    assert draw([[0.4, 0.3, 0.2, 0.1]], [0.99], top_p=0.5, top_k=2) == [1]


def test_top_k_keeps_the_lowest_of_equals() -> None:
    assert draw([[0.1, 0.3, 0.3, 0.3]] * 2, [0.49, 0.99], top_k=2) == [1, 2]


def test_truncation_keeps_the_order_of_the_vocabulary() -> None:
    """Kept are 2 (0.5) and 0 (0.3): the walk meets 0 first."""
    assert draw([[0.3, 0.2, 0.5]] * 2, [0.37, 0.38], top_k=2) == [0, 2]


def test_draw_does_not_depend_on_the_batch() -> None:
    hidden, weight, *settings = made(60)
    together = ops.sample(hidden, weight, *settings, FP32)
    chosen = torch.randperm(60)[:23]
    for rows in (chosen, *(torch.tensor([row]) for row in range(60))):
        apart = ops.sample(hidden[rows], weight, *(setting[rows] for setting in settings), FP32)
        assert all(torch.equal(a, b[rows]) for a, b in zip(apart, together, strict=True))


def test_recorded_log_prob_is_the_trainers() -> None:
    """Before top-p and top-k, at the row's temperature; a greedy row is recorded at temperature 1."""
    hidden, weight, temperature, *settings = made(60)
    tokens, log_probs, rows, _ = ops.sample(hidden, weight, temperature, *settings, FP32)
    assert torch.equal(rows.gather(1, tokens[:, None]).squeeze(1), log_probs)
    for value in (0.0, 0.6, 1.0):
        chosen = temperature == torch.tensor(value)
        trained, _ = ops.log_probs(hidden[chosen], weight, tokens[chosen], value or 1.0, FP32)
        assert torch.equal(trained, log_probs[chosen])


def processed(probabilities: list[float], uniform: float, banned: list[int] | None = None, **limits: float) -> tuple:
    """The token drawn from one row, its probability among those that could have been, and its own log-prob."""
    weight = torch.tensor([probabilities]).log().t().contiguous()
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, **limits}
    arguments = (torch.tensor([value]) for value in settings.values())
    ban = None if banned is None else torch.tensor([banned])
    number = torch.tensor([uniform], dtype=torch.float64)
    tokens, log_probs, _, processed = ops.sample(torch.eye(1), weight, *arguments, number, FP32, ban)
    return tokens.item(), pytest.approx(processed.exp().item()), pytest.approx(log_probs.exp().item())


@pytest.mark.parametrize(
    ("limits", "uniform", "expected"),
    [
        ({}, 0.6, (1, 0.25, 0.25)),
        ({"top_k": 2}, 0.7, (1, 0.25 / 0.75, 0.25)),
        ({"top_p": 0.8}, 0.99, (2, 0.15 / 0.9, 0.15)),
        ({"min_p": 0.5}, 0.1, (0, 0.5 / 0.75, 0.5)),
        ({"temperature": 0.0}, 0.99, (0, 1.0, 0.5)),
    ],
)
def test_processed_log_probs_are_those_of_what_could_be_drawn(limits: dict, uniform: float, expected: tuple) -> None:
    assert processed([0.5, 0.25, 0.15, 0.1], uniform, **limits) == expected


@pytest.mark.parametrize(
    ("banned", "limits", "uniform", "expected"),
    [
        ([-1, -1], {}, 0.1, (0, 0.5, 0.5)),
        ([0, -1], {}, 0.49, (1, 0.5, 0.25)),  # of 0.25, 0.15, 0.1 the first is half
        ([0, 1], {}, 0.59, (2, 0.6, 0.15)),
        ([0, 0], {}, 0.49, (1, 0.5, 0.25)),  # twice is once
        ([0, -1], {"temperature": 0.0}, 0.9, (1, 1.0, 0.25)),
        ([0, -1], {"top_k": 1}, 0.9, (1, 1.0, 0.25)),
        ([0, -1], {"top_p": 0.5}, 0.99, (1, 1.0, 0.25)),  # half of what is left
        ([0, -1], {"top_p": 0.51}, 0.99, (2, 0.15 / 0.4, 0.15)),
        ([0, -1], {"min_p": 0.5}, 0.99, (2, 0.15 / 0.4, 0.15)),  # of the largest that is left
    ],
)
def test_banned_tokens_are_not_drawn_and_the_log_prob_stays(banned, limits, uniform, expected) -> None:
    assert processed([0.5, 0.25, 0.15, 0.1], uniform, banned, **limits) == expected


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_the_most_likely_are_the_first_of_a_stable_sort(seed: int, count: int) -> None:
    """Among equals the lowest ids; also of numbers above 0, which rounding can make of a log-prob."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-4, 2, (3, 12), generator=generator) * 0.5
    ids, values = ops.most_likely(rows, count)
    expected, order = rows.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, order[:, :count])
    assert torch.equal(values, expected[:, :count])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_learners_beyond_a_block_of_the_vocabulary(temperature: float) -> None:
    """Sums over the vocabulary run by blocks, of which most tests fill no more than one."""
    rows, vocabulary = 300, 2 * VOCAB_BLOCK + 37  # many, as the logarithm hides most differences of a sum
    hidden, weight = torch.randn(rows, 16), torch.randn(vocabulary, 16)
    settings = torch.full((rows,), temperature), torch.ones(rows), torch.zeros(rows), torch.zeros(rows)
    uniform = torch.rand(rows, dtype=torch.float64)
    tokens, chosen, every, _ = ops.sample(hidden, weight, *settings, uniform, FP32)
    assert torch.equal(chosen, ops.log_probs(hidden, weight, tokens, temperature, FP32)[0])
    assert torch.equal(every, ops.full_log_probs(hidden, weight, temperature, FP32))
