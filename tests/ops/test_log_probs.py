"""log_probs and full_log_probs: the one place where a token's log-probability comes from."""

import importlib
import math

import pytest
import torch
from torch import Tensor

import ops
from tests.ops.checks import (
    ROWS,
    UNIT,
    assert_rows_do_not_depend_on_batch,
    assert_within,
    differentiate,
    differentiate_fp64,
)

U = UNIT[torch.float32]
FP32, BF16 = torch.float32, torch.bfloat16
IMPLEMENTATION = importlib.import_module("ops.log_probs")  # the package attribute of this name is the function
DTYPES = [FP32, BF16]


def made(tokens: int = 13, dim: int = 19, vocabulary: int = 31) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(tokens, dim), torch.randn(vocabulary, dim), torch.randint(0, vocabulary, (tokens,))


def test_hand_worked() -> None:
    """Logits 0 and log 3: 1/4 and 3/4. At temperature 1/2 they are 0 and 2 log 3: 1/10 and 9/10."""
    hidden, weight, targets = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)]]), torch.tensor([0, 1])
    entropy = {1.0: math.log(4) - 0.75 * math.log(3), 0.5: math.log(10) - 0.9 * math.log(9)}
    for temperature, expected in ((1.0, [0.25, 0.75]), (0.5, [0.1, 0.9])):
        log_probs, entropies = ops.log_probs(hidden, weight, targets, temperature, FP32)
        assert log_probs.exp().tolist() == pytest.approx(expected)
        assert entropies.tolist() == pytest.approx([entropy[temperature]] * 2)


def test_uniform_distribution() -> None:
    log_probs, entropy = ops.log_probs(torch.zeros(1, 3), torch.randn(7, 3), torch.tensor([5]), 1.0, FP32)
    assert log_probs.item() == pytest.approx(-math.log(7))
    assert entropy.item() == pytest.approx(math.log(7))


def test_huge_logits_do_not_overflow() -> None:
    log_probs, entropy = ops.log_probs(torch.ones(1, 1), torch.tensor([[1e4], [-1e4]]), torch.tensor([1]), 1.0, FP32)
    assert (log_probs.item(), entropy.item()) == (-2e4, 0.0)


@pytest.mark.parametrize("vocab_block", [32, 64, 8192])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_reference(
    vocab_block: int, temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of operands that are rounded to `dtype` in the reference too.

    With X the largest sum |h w| / temperature, a logit is off by (D + 2) u X and the log of the sum by that plus
    (V + 10) u; p = exp(x - log sum) by e = 2 (D + 2) u X + (V + 10) u of itself. Hence

    log-prob   e + 2 u X                           entropy = sum p (log sum - x): e (1 + 2 (X + log V))
    dx = g (1[v = t] - p) / temperature, off by (e + 4 u) |g| (1[v = t] + p) / temperature
    dh         adds a sum over V, dW one over T: e + (V + 4) u and e + (T + 4) u of the sums of absolute terms;
               in BF16 dx is rounded to it first
    """
    monkeypatch.setattr(IMPLEMENTATION, "VOCAB_BLOCK", vocab_block)
    hidden, weight, targets = made(vocabulary=91)
    (tokens, dim), vocabulary, grad = hidden.shape, len(weight), torch.randn(len(hidden))

    def reference(h: Tensor, w: Tensor) -> Tensor:
        return ops.log_probs_reference(h, w, targets, temperature)[0]

    got = differentiate(lambda h, w: ops.log_probs(h, w, targets, temperature, dtype)[0], (hidden, weight), grad)
    got_entropy = ops.log_probs(hidden, weight, targets, temperature, dtype)[1]
    hidden, weight = hidden.to(dtype).float(), weight.to(dtype).float()
    want = differentiate_fp64(reference, (hidden, weight), grad)
    entropy = ops.log_probs_reference(hidden.double(), weight.double(), targets, temperature)[1]
    logits = (hidden.double() @ weight.double().t()) / temperature
    largest = (hidden.abs() @ weight.abs().t()).max().item() / temperature
    error = 2 * (dim + 2) * U * largest + (vocabulary + 10) * U
    assert_within(got.output, want.output, error + 2 * U * largest)
    assert_within(got_entropy, entropy, error * (1 + 2 * (largest + math.log(vocabulary))))
    chosen = torch.nn.functional.one_hot(targets, vocabulary)
    logit_grad = grad.abs()[:, None] * (chosen + logits.softmax(-1)) / temperature
    error += UNIT[BF16] if dtype == BF16 else 0.0
    hidden_bound = (error + (vocabulary + 4) * U) * (logit_grad @ weight.abs().double())
    weight_bound = (error + (tokens + 4) * U) * (logit_grad.t() @ hidden.abs().double())
    assert_within(got.inputs[0], want.inputs[0], hidden_bound)
    assert_within(got.inputs[1], want.inputs[1], weight_bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_block", [32, 8192])
def test_selected_equals_full(vocab_block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IMPLEMENTATION, "VOCAB_BLOCK", vocab_block)
    hidden, weight, targets = made(tokens=40, vocabulary=70)
    selected, _ = ops.log_probs(hidden, weight, targets, 0.7, dtype)
    for rows in (torch.arange(40), torch.tensor([17]), torch.randperm(40)[:11]):
        full = ops.full_log_probs(hidden[rows], weight, 0.7, dtype)
        assert torch.equal(full.gather(1, targets[rows, None]).squeeze(1), selected[rows])
        each = ops.full_log_probs(hidden[rows], weight, torch.full((len(rows), 1), 0.7), dtype)
        assert torch.equal(each, full)


def test_row_blocks_move_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = made(tokens=40)
    whole = ops.log_probs(hidden, weight, targets, 1.0, FP32)
    monkeypatch.setattr(IMPLEMENTATION, "ROW_BLOCK", 7)
    assert all(torch.equal(a, b) for a, b in zip(ops.log_probs(hidden, weight, targets, 1.0, FP32), whole, strict=True))


def test_low_precision_weight_is_widened_first() -> None:
    hidden, weight, targets = made(vocabulary=91)
    low = weight.bfloat16().requires_grad_()
    log_probs, entropy = ops.log_probs(hidden, low, targets, 1.0, BF16)
    assert torch.equal(log_probs, ops.log_probs(hidden, low.float(), targets, 1.0, BF16)[0])
    assert not entropy.requires_grad
    log_probs.sum().backward()
    assert low.grad.dtype == torch.bfloat16


def test_gradient_passes_straight_through_the_rounding() -> None:
    hidden, weight, targets = made(vocabulary=91)
    grad = torch.randn(len(hidden))
    master = differentiate(lambda h, w: ops.log_probs(h, w, targets, 0.7, BF16)[0], (hidden, weight), grad)
    rounded = hidden.bfloat16().float(), weight.bfloat16().float()
    working = differentiate(lambda h, w: ops.log_probs(h, w, targets, 0.7, BF16)[0], rounded, grad)
    assert torch.equal(master.output, working.output)
    assert all(torch.equal(a, b) for a, b in zip(master.inputs, working.inputs, strict=True))


def test_each_row_has_its_own_temperature() -> None:
    """Equal in bits, gradients included, to each row at its temperature."""
    hidden, weight, targets = made(tokens=4)
    temperature, grad = torch.tensor([0.5, 1.0, 0.7, 2.0]), torch.randn(4)
    for shape in ((4,), (4, 1)):
        each = temperature.view(shape)
        got = differentiate(lambda h, t=each: ops.log_probs(h, weight, targets, t, FP32)[0], (hidden,), grad)
        for row, value in enumerate(temperature.tolist()):
            alone = lambda h, v=value: ops.log_probs(h, weight, targets, v, FP32)[0]  # noqa: E731
            want = differentiate(alone, (hidden,), grad)
            assert torch.equal(got.output[row], want.output[row])
            assert torch.equal(got.inputs[0][row], want.inputs[0][row])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 41), (128, 1000)])
def test_row_bits_do_not_depend_on_the_batch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    hidden, weight, targets = made(ROWS, *shape)
    assert_rows_do_not_depend_on_batch(lambda h, t: ops.log_probs(h, weight, t, 0.8, dtype), hidden, targets)


@pytest.mark.usefixtures("threads")
def test_full_row_bits_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IMPLEMENTATION, "VOCAB_BLOCK", 96)
    hidden, weight, _ = made(ROWS, 37, 257)
    assert_rows_do_not_depend_on_batch(lambda h: (ops.full_log_probs(h, weight, 0.8, FP32),), hidden)
