"""Shared by the operator tests: errors held against derived bounds, and rows that must not depend on their batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # unit roundoff: one rounding moves x by at most UNIT |x|
BATCHES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 64, 70)
ROWS = 72

Function = Callable[..., Tensor]


class Gradients(NamedTuple):
    output: Tensor
    inputs: tuple[Tensor, ...]


def differentiate(function: Function, inputs: tuple[Tensor, ...], grad: Tensor) -> Gradients:
    """The output, and the gradient of sum(output * grad) for each input."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    output = function(*leaves)
    gradients = torch.autograd.grad(output, leaves, grad.to(output.dtype))
    return Gradients(output.detach(), gradients)


def differentiate_fp64(function: Function, inputs: tuple[Tensor, ...], grad: Tensor) -> Gradients:
    return differentiate(function, tuple(x.double() for x in inputs), grad.double())


def magnitude(function: Function, inputs: tuple[Tensor, ...], grad: Tensor) -> Gradients:
    """The same on absolute values. For sums of products it is the sum of |terms|: the scale of rounding errors."""
    return differentiate_fp64(function, tuple(x.abs() for x in inputs), grad.abs())


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    assert bool((error <= bound).all()), f"error exceeds its bound by {(error - bound).max().item():.3g}"


def rows_alone(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Each row by itself, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    outputs = [function(*(x[row : row + 1] for x in inputs)) for row in range(len(inputs[0]))]
    torch.set_num_threads(threads)
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]


def assert_rows_do_not_depend_on_batch(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """inputs have ROWS rows. Batches of many sizes, in order and shuffled, must give each row the bits it has alone."""
    alone = rows_alone(function, inputs)
    for batch in BATCHES:
        for chosen in (torch.arange(ROWS - batch, ROWS), torch.randperm(ROWS)[:batch]):
            for expected, actual in zip(alone, function(*(x[chosen] for x in inputs)), strict=True):
                assert torch.equal(actual, expected[chosen]), f"a row changed in a batch of {batch}"
