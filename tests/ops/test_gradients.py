"""gradient_norm and clip_gradients on a CPU: torch's own, to the bit."""

import pytest
import torch
from torch import Tensor

from ops.gradients import clip_gradients, gradient_norm, gradient_norm_reference


def made() -> list[Tensor]:
    return [torch.randn(37, 41), torch.randn(7), torch.randn(3, 5, 2), torch.randn(())]


def test_hand_worked() -> None:
    tensors = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    norm = gradient_norm(tensors)
    assert norm.item() == 5.0
    clip_gradients(tensors, 1.0, norm)
    assert [x.flatten().tolist() for x in tensors] == [pytest.approx([0.6, 0.0]), pytest.approx([0.8])]


def test_norm_against_reference() -> None:
    tensors = made()
    expected = gradient_norm_reference([x.double() for x in tensors]).item()
    assert gradient_norm(tensors).item() == pytest.approx(expected, rel=1e-6)


def test_of_nothing() -> None:
    assert gradient_norm([]).item() == 0.0
    clip_gradients([], 1.0, torch.tensor(0.0))


@pytest.mark.parametrize("max_norm", [1.0, 1000.0])
def test_same_bits_as_torch(max_norm: float) -> None:
    tensors = made()
    parameters = [torch.nn.Parameter(torch.zeros_like(x)) for x in tensors]
    for parameter, x in zip(parameters, tensors, strict=True):
        parameter.grad = x.clone()
    norm = gradient_norm(tensors)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    clip_gradients(tensors, max_norm, norm)
    assert all(torch.equal(x, parameter.grad) for x, parameter in zip(tensors, parameters, strict=True))
