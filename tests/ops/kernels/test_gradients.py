"""gradient_norm and clip_gradients in Triton, which reach their tensors through a table of addresses."""

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from ops.gradients import BLOCK, clip_gradients, gradient_norm, gradient_norm_reference
from tests.ops.checks import UNIT
from tests.ops.kernels.harness import DEVICE, ON_GPU, adversarial, reachable

U = UNIT[torch.float32]


def made() -> list[Tensor]:
    """Two blocks and a tail, a single number, BF16, addresses and lengths that are no multiple of 16 bytes."""
    shapes = [(2 * BLOCK + 4,), (), (37, 41), (64, 8)]
    tensors = [torch.randn(shape) for shape in shapes] + [torch.randn(64, 8).bfloat16(), torch.randn(101).bfloat16()]
    return [x.to(DEVICE) for x in tensors] + [torch.randn(50).to(DEVICE)[1:]]


def norm_of(tensors: list[Tensor], order_seed: int = 0) -> Tensor:
    with reachable(*tensors), adversarial(order_seed):
        return gradient_norm(tensors)


def test_hand_worked() -> None:
    tensors = [torch.tensor([3.0, 0.0], device=DEVICE), torch.tensor([[4.0]], device=DEVICE)]
    norm = norm_of(tensors)
    assert norm.item() == 5.0
    with reachable(*tensors):
        clip_gradients(tensors, 1.0, norm)
    assert [x.flatten().tolist() for x in tensors] == [pytest.approx([0.6, 0.0]), pytest.approx([0.8])]


def test_norm_is_rounded_once() -> None:
    """FP64 inside: half a unit of FP32 for the result, and nothing to speak of for the sum."""
    tensors = made()
    norm = norm_of(tensors)
    expected = gradient_norm_reference([x.double() for x in tensors]).item()
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert norm.item() == pytest.approx(expected, rel=1.001 * U)


def test_norm_bits_do_not_depend_on_the_order_of_programs() -> None:
    tensors = made()
    assert torch.equal(norm_of(tensors, order_seed=1), norm_of(tensors, order_seed=2))


def test_numbers_that_are_not_finite_show() -> None:
    tensors = made()
    tensors[4][0, 0] = float("inf")
    assert norm_of(tensors).item() == float("inf")
    tensors[0][5] = float("nan")
    assert norm_of(tensors).isnan()


def test_clip_has_the_bits_of_torch() -> None:
    tensors = made()
    norm = norm_of(tensors)
    parameters = [torch.nn.Parameter(torch.zeros_like(x)) for x in tensors]
    for parameter, x in zip(parameters, tensors, strict=True):
        parameter.grad = x.clone()
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    with reachable(*tensors), adversarial():
        clip_gradients(tensors, 1.0, norm)
    assert all(torch.equal(x, parameter.grad) for x, parameter in zip(tensors, parameters, strict=True))


def test_a_small_norm_is_left_alone() -> None:
    tensors = made()
    before = [x.clone() for x in tensors]
    norm = norm_of(tensors)
    with reachable(*tensors):
        clip_gradients(tensors, 2 * norm.item(), norm)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


if not ON_GPU:

    def test_the_sanitizer_knows_what_a_table_may_name() -> None:
        tensors = made()
        with pytest.raises(InterpreterError, match="out-of-bounds load"), reachable(*tensors[:-1]):
            gradient_norm(tensors)
