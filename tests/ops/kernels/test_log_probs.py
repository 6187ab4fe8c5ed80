"""log_probs and full_log_probs in Triton: bounds as on the CPU path."""

import importlib
import math
from functools import partial

import pytest
import torch
from torch import Tensor

import ops
from ops import lm_head
from tests.ops.checks import UNIT, Gradients, assert_within, differentiate, differentiate_fp64
from tests.ops.kernels.harness import DEVICE, adversarial, assert_rows_alone, poison

IMPLEMENTATION = importlib.import_module("ops.log_probs")  # the package attribute of this name is the function
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [FP32, BF16]
U = UNIT[FP32]
TEMPERATURE = 0.7


def made(tokens: int, dim: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, targets; rows of NaN follow hidden in memory."""
    hidden = poison(tokens + 100, dim)[:tokens]
    hidden.copy_(torch.randn(tokens, dim))
    return hidden, torch.randn(vocabulary, dim).to(DEVICE), torch.randint(0, vocabulary, (tokens,)).to(DEVICE)


def assert_accurate(made: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, got: Gradients, grad: Tensor) -> None:
    """The bounds of tests/ops/test_log_probs.py."""
    hidden, weight, targets = made
    hidden, weight = hidden.to(dtype).float(), weight.to(dtype).float()
    (tokens, dim), vocabulary = hidden.shape, len(weight)

    def reference(h: Tensor, w: Tensor) -> Tensor:
        return ops.log_probs_reference(h, w, targets, TEMPERATURE)[0]

    want = differentiate_fp64(reference, (hidden, weight), grad)
    logits = (hidden.double() @ weight.double().t()) / TEMPERATURE
    largest = (hidden.abs() @ weight.abs().t()).max().item() / TEMPERATURE
    error = 2 * (dim + 6) * U * largest + (vocabulary + 16) * U
    assert_within(got.output, want.output, error + 2 * U * largest)
    error += UNIT[BF16] if dtype == BF16 else 0.0
    chosen = torch.nn.functional.one_hot(targets, vocabulary)
    logit_grad = grad.abs()[:, None] * (chosen + logits.softmax(-1)) / TEMPERATURE
    hidden_bound = (error + (vocabulary + 8) * U) * (logit_grad @ weight.abs().double())
    weight_bound = (error + (tokens + 8) * U) * (logit_grad.t() @ hidden.abs().double())
    assert_within(got.inputs[0], want.inputs[0], hidden_bound)
    assert_within(got.inputs[1], want.inputs[1], weight_bound)


def run(made: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, grad: Tensor) -> Gradients:
    hidden, weight, targets = made
    return differentiate(lambda h, w: ops.log_probs(h, w, targets, TEMPERATURE, dtype)[0], (hidden, weight), grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (13, 19, 31), (70, 70, 300)])
def test_output_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The last shape has tails in two tiles of each kind."""
    inputs, grad = made(*shape), torch.randn(shape[0]).to(DEVICE)
    assert_accurate(inputs, dtype, run(inputs, dtype, grad), grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_by_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, grad = made(70, 19, 600), torch.randn(70).to(DEVICE)
    monkeypatch.setattr(IMPLEMENTATION, "GRADIENT_ROWS", 64)
    monkeypatch.setattr(IMPLEMENTATION, "GRADIENT_COLUMNS", 256)
    assert_accurate(inputs, dtype, run(inputs, dtype, grad), grad)


def test_operands_that_are_not_rounded_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "operands", lambda h, w, _: (h, w.bfloat16().float()))
    inputs, grad = made(13, 19, 31), torch.randn(13).to(DEVICE)
    with pytest.raises(AssertionError, match="exceeds its bound"):
        assert_accurate(inputs, BF16, run(inputs, BF16, grad), grad)


def test_logits_keep_the_bits_of_their_sums() -> None:
    """Logits (1 + 2^-14, 0) and (1, 0), which BF16 cannot tell apart: log-probs of the second token, known in FP64."""
    hidden = torch.tensor([[1.0, 2.0**-14], [1.0, 0.0]], device=DEVICE)
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]], device=DEVICE)
    first, second = ops.full_log_probs(hidden, weight, 1.0, BF16)[:, 1].tolist()
    assert second == pytest.approx(-1.3132616875, abs=2e-7)
    assert second - first == pytest.approx(0.731 * 2.0**-14, abs=2.0**-21)


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy(dtype: torch.dtype) -> None:
    """Uniform over 7; and against the reference, with the bound of the CPU path."""
    hidden, weight, targets = made(13, 19, 300)
    _, uniform = ops.log_probs(0 * hidden, weight[:7], targets % 7, 1.0, dtype)
    assert uniform.tolist() == pytest.approx([math.log(7)] * 13, rel=1e-6)
    h, w = hidden.to(dtype).double(), weight.to(dtype).double()
    want = ops.log_probs_reference(h, w, targets, TEMPERATURE)[1]
    largest = (h.abs() @ w.abs().t()).max().item() / TEMPERATURE
    error = 2 * (19 + 6) * U * largest + 316 * U
    got = ops.log_probs(hidden, weight, targets, TEMPERATURE, dtype)[1]
    assert_within(got, want, error * (1 + 2 * (largest + math.log(300))))


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight = torch.ones(1, 1, device=DEVICE), torch.tensor([[1e4], [-1e4]], device=DEVICE)
    log_probs, entropy = ops.log_probs(hidden, weight, torch.tensor([1], device=DEVICE), 1.0, FP32)
    assert (log_probs.item(), entropy.item()) == (-2e4, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_bits_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    hidden, weight, targets = made(70, 40, 300)
    rows = [hidden, targets, torch.linspace(0.5, 2, 70).to(DEVICE)]
    assert_rows_alone(lambda h, t, c: ops.log_probs(h, weight, t, c, dtype), rows, counts=(1, 17, 64))
    assert_rows_alone(lambda h, _, c: (ops.full_log_probs(h, weight, c, dtype),), rows, counts=(1,))


def test_a_tile_that_follows_the_batch_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = made(70, 40, 300)
    tile = lm_head._TILES[BF16]

    def adaptive(h: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        monkeypatch.setitem(lm_head._TILES, BF16, {**tile, "BLOCK_T": 16} if len(h) < 16 else tile)
        return ops.log_probs(h, weight, t, 1.0, BF16)

    with pytest.raises(AssertionError, match="rows from"):
        assert_rows_alone(adaptive, [hidden, targets], counts=(1,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_selected_equals_full(dtype: torch.dtype) -> None:
    """In another batch, in another order of programs, by a temperature for all or for each."""
    hidden, weight, targets = made(70, 40, 300)
    with adversarial(1):
        selected, _ = ops.log_probs(hidden, weight, targets, TEMPERATURE, dtype)
    rows = torch.tensor([0, 69, 17], device=DEVICE)
    for temperature in (TEMPERATURE, torch.full((3, 1), TEMPERATURE, device=DEVICE)):
        with adversarial(2):
            full = ops.full_log_probs(hidden[rows], weight, temperature, dtype)
        assert torch.equal(full.gather(1, targets[rows, None]).squeeze(1), selected[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_before_it_is_written(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, grad = made(13, 19, 300), torch.randn(13).to(DEVICE)
    expected = run(inputs, dtype, grad)

    def poisoned(_: Tensor, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return poison(*shape, dtype=dtype)

    monkeypatch.setattr(lm_head, "like", poisoned)
    got = run(inputs, dtype, grad)
    assert torch.equal(got.output, expected.output)
    assert all(torch.equal(a, b) for a, b in zip(got.inputs, expected.inputs, strict=True))


def test_gradient_bits_do_not_depend_on_the_order_of_programs() -> None:
    inputs, grad = made(70, 19, 300), torch.randn(70).to(DEVICE)
    results = []
    for seed in (1, 2):
        with adversarial(seed):
            results.append(run(inputs, BF16, grad).inputs)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_passes_straight_through_the_rounding() -> None:
    hidden, weight, targets = made(13, 19, 31)
    grad = torch.randn(13).to(DEVICE)
    function = partial(run, dtype=BF16, grad=grad)
    master = function((hidden, weight, targets))
    working = function((hidden.bfloat16().float(), weight.bfloat16().float(), targets))
    assert torch.equal(master.output, working.output)
    assert all(torch.equal(a, b) for a, b in zip(master.inputs, working.inputs, strict=True))
