"""cross_entropy in Triton: its losses are those of log_probs to the bit, its gradients within their bounds."""

import importlib

import pytest
import torch
from torch import Tensor

import ops
from ops import lm_head
from ops.cross_entropy import cross_entropy, cross_entropy_reference
from tests.ops.checks import UNIT, Gradients, assert_within, differentiate, differentiate_fp64
from tests.ops.kernels.harness import DEVICE, adversarial, poison

IMPLEMENTATION = importlib.import_module("ops.cross_entropy")
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [FP32, BF16]
U = UNIT[FP32]
ONE = torch.tensor(1.0, device=DEVICE)
Made = tuple[Tensor, Tensor, Tensor, Tensor]


def made(tokens: int, dim: int, vocabulary: int) -> Made:
    """hidden, weight, targets, row_weights."""
    targets = torch.randint(0, vocabulary, (tokens,))
    inputs = torch.randn(tokens, dim), torch.randn(vocabulary, dim), targets, torch.rand(tokens)
    hidden, weight, targets, row_weights = (x.to(DEVICE) for x in inputs)
    return hidden, weight, targets, row_weights


def run(inputs: Made, dtype: torch.dtype) -> Gradients:
    return differentiate(lambda h, w: cross_entropy(h, w, *inputs[2:], dtype), inputs[:2], ONE)


def assert_accurate(inputs: Made, dtype: torch.dtype, got: Gradients) -> None:
    """Bounds of test_log_probs.py beside this file."""
    hidden, weight, targets, row_weights = inputs
    hidden, weight = hidden.to(dtype).float(), weight.to(dtype).float()
    (tokens, dim), vocabulary = hidden.shape, len(weight)
    reference = lambda h, w: cross_entropy_reference(h, w, targets, row_weights.double())  # noqa: E731
    want = differentiate_fp64(reference, (hidden, weight), ONE)
    largest = (hidden.abs() @ weight.abs().t()).max().item()
    error = 2 * (dim + 6) * U * largest + (vocabulary + 16) * U
    assert_within(got.output, want.output, (error + 2 * U * largest) * row_weights.sum() + tokens * U * want.output)
    chosen = torch.nn.functional.one_hot(targets, vocabulary)
    logit_grad = row_weights[:, None] * (chosen + (hidden.double() @ weight.double().t()).softmax(-1))
    error += UNIT[BF16] if dtype == BF16 else 0.0
    hidden_bound = (error + (vocabulary + 8) * U) * (logit_grad @ weight.abs().double())
    weight_bound = (error + (tokens + 8) * U) * (logit_grad.t() @ hidden.abs().double())
    assert_within(got.inputs[0], want.inputs[0], hidden_bound)
    assert_within(got.inputs[1], want.inputs[1], weight_bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (70, 70, 300)])
def test_loss_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = made(*shape)
    assert_accurate(inputs, dtype, run(inputs, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IMPLEMENTATION, "LOGITS", 1)
    monkeypatch.setattr(IMPLEMENTATION, "ROW_STEP", 16)
    inputs = made(40, 19, 31)
    assert_accurate(inputs, dtype, run(inputs, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_have_the_bits_of_log_probs(dtype: torch.dtype) -> None:
    """Row weights of one 1 pick a loss; in another order of programs."""
    hidden, weight, targets, _ = made(20, 19, 300)
    with adversarial(1):
        log_probs, _ = ops.log_probs(hidden, weight, targets, 1.0, dtype)
    for row in (0, 19):
        only = torch.zeros(20, device=DEVICE).index_fill_(0, torch.tensor([row], device=DEVICE), 1.0)
        with adversarial(2):
            loss = cross_entropy(hidden.clone().requires_grad_(), weight, targets, only, dtype)
            assert torch.equal(cross_entropy(hidden, weight, targets, only, dtype), loss)
        assert torch.equal(loss, -log_probs[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_before_it_is_written(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = made(13, 19, 300)
    expected = run(inputs, dtype)

    def poisoned(_: Tensor, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return poison(*shape, dtype=dtype)

    monkeypatch.setattr(lm_head, "like", poisoned)
    monkeypatch.setattr(IMPLEMENTATION, "like", poisoned)
    got = run(inputs, dtype)
    assert torch.equal(got.output, expected.output)
    assert all(torch.equal(a, b) for a, b in zip(got.inputs, expected.inputs, strict=True))


def test_gradient_bits_do_not_depend_on_the_order_of_programs() -> None:
    inputs = made(70, 19, 300)
    results = []
    for seed in (1, 2):
        with adversarial(seed):
            results.append(run(inputs, BF16))
    assert torch.equal(results[0].output, results[1].output)
    assert all(torch.equal(a, b) for a, b in zip(results[0].inputs, results[1].inputs, strict=True))


def test_a_forgotten_target_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from_logits = lm_head.gradient_from_logits
    monkeypatch.setattr(lm_head, "gradient_from_logits", lambda x, t, *others: from_logits(x, t - 1, *others))
    inputs = made(13, 19, 31)
    with pytest.raises(AssertionError, match="exceeds its bound"):
        assert_accurate(inputs, BF16, run(inputs, BF16))
