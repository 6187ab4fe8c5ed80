"""cross_entropy: the loss and the gradients of log_probs, in one pass."""

import importlib
import math

import pytest
import torch
from torch import Tensor

import ops
from ops.cross_entropy import cross_entropy, cross_entropy_reference
from tests.ops.checks import UNIT, assert_within, differentiate, differentiate_fp64

U = UNIT[torch.float32]
FP32 = torch.float32
IMPLEMENTATION = importlib.import_module("ops.cross_entropy")
ONE = torch.tensor(1.0)


def made(tokens: int = 13, dim: int = 19, vocabulary: int = 31) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    targets = torch.randint(0, vocabulary, (tokens,))
    return torch.randn(tokens, dim), torch.randn(vocabulary, dim), targets, torch.rand(tokens)


def test_hand_worked() -> None:
    """Logits 0 and log 3, target 0: loss log 4 times the weight 2, gradient of the logits 2 (-3/4, 3/4)."""
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    loss = cross_entropy(hidden, weight, torch.tensor([0]), torch.tensor([2.0]), FP32)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(4))
    assert weight.grad.flatten().tolist() == pytest.approx([-1.5, 1.5])
    assert hidden.grad.item() == pytest.approx(1.5 * math.log(3))


def test_against_reference() -> None:
    """The bounds of log_probs (see there) for the gradient w of each log-prob; the sum of losses adds T u of itself."""
    hidden, weight, targets, row_weights = made()
    (tokens, dim), vocabulary = hidden.shape, len(weight)
    got = differentiate(lambda h, w: cross_entropy(h, w, targets, row_weights, FP32), (hidden, weight), ONE)
    reference = lambda h, w: cross_entropy_reference(h, w, targets, row_weights.double())  # noqa: E731
    want = differentiate_fp64(reference, (hidden, weight), ONE)
    largest = (hidden.abs() @ weight.abs().t()).max().item()
    error = 2 * (dim + 2) * U * largest + (vocabulary + 10) * U
    bound = (error + 2 * U * largest) * row_weights.sum() + tokens * U * want.output
    assert_within(got.output, want.output, bound)
    chosen = torch.nn.functional.one_hot(targets, vocabulary)
    logit_grad = row_weights[:, None] * (chosen + (hidden.double() @ weight.double().t()).softmax(-1))
    hidden_bound = (error + (vocabulary + 4) * U) * (logit_grad @ weight.abs().double())
    weight_bound = (error + (tokens + 4) * U) * (logit_grad.t() @ hidden.abs().double())
    assert_within(got.inputs[0], want.inputs[0], hidden_bound)
    assert_within(got.inputs[1], want.inputs[1], weight_bound)


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_same_bits_as_log_probs(dtype: torch.dtype) -> None:
    """Token by token the loss, and the gradients, are those of log_probs."""
    hidden, weight, targets, row_weights = made(tokens=40)
    log_probs, _ = ops.log_probs(hidden, weight, targets, 1.0, dtype)
    for row in (0, 17, 39):
        only = torch.zeros(40).index_fill_(0, torch.tensor([row]), 1.0)
        leaf = hidden.clone().requires_grad_()
        assert torch.equal(cross_entropy(leaf, weight, targets, only, dtype), -log_probs[row])
    fused = differentiate(lambda h, w: cross_entropy(h, w, targets, row_weights, dtype), (hidden, weight), ONE)
    apart = differentiate(lambda h, w: ops.log_probs(h, w, targets, 1.0, dtype)[0], (hidden, weight), -row_weights)
    assert all(torch.equal(a, b) for a, b in zip(fused.inputs, apart.inputs, strict=True))


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden, weight, targets, row_weights = made()
    loss = cross_entropy(hidden.clone().requires_grad_(), weight, targets, row_weights, FP32)
    with torch.no_grad():
        assert torch.equal(cross_entropy(hidden, weight, targets, row_weights, FP32), loss)


def test_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 rows at once, and in blocks of 128: the loss is the same, gradients of W are added up in another order."""
    inputs = made(tokens=300)
    run = lambda h, w: cross_entropy(h, w, *inputs[2:], FP32)  # noqa: E731
    whole = differentiate(run, inputs[:2], ONE)
    monkeypatch.setattr(IMPLEMENTATION, "LOGITS", 1)
    parts = differentiate(run, inputs[:2], ONE)
    assert torch.equal(parts.output, whole.output)
    assert_within(parts.inputs[0], whole.inputs[0], 1e-5)
    assert_within(parts.inputs[1], whole.inputs[1], 1e-4)


def test_gradient_is_scaled_once() -> None:
    hidden, weight, targets, row_weights = made()
    run = lambda h: cross_entropy(h, weight, targets, row_weights, FP32)  # noqa: E731
    once, twice = (differentiate(run, (hidden,), torch.tensor(value)).inputs[0] for value in (1.0, 2.0))
    assert torch.equal(2 * once, twice)
    loss = run(hidden.requires_grad_())
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward pass"):
        loss.backward()
