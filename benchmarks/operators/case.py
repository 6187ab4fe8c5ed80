"""A production shape of an operator: what the compile check builds and what the GPU suite times.

Each module beside this one lists the cases of an operator in `CASES`. A case runs the public function, through
whichever path is in force; inputs may be uninitialised memory of full model size, so nothing depends on their values.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Arguments = tuple[object, ...]


@dataclass(frozen=True)
class Case:
    """operator: the name of its test module, tests/ops/kernels/test_<operator>.py; only what passes there is timed."""

    operator: str
    name: str  # what runs, such as "forward" or "decode"
    shape: str  # such as "T8192 D2048"
    inputs: Callable[[torch.device], Arguments]
    run: Callable[..., object]
    bytes: float = 0.0  # least traffic with device memory, for the share of the bandwidth
    flops: float = 0.0  # arithmetic of matrix products, for the share of the peak
    dtype: str = "bfloat16"  # whose peak: bfloat16, float32 or float8
    # What a user would call instead, by name: a function that imports it and returns the call, with the same arguments.
    # ImportError means "not here". The first entry is the one targets are stated against.
    peers: dict[str, Callable[[], Callable[..., object]]] = field(default_factory=dict)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[torch.device], Tensor]:
    """Values in [-1, 1] on a GPU; untouched memory, which costs nothing, where nothing is computed."""

    def make(device: torch.device) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        return x.uniform_(-1, 1) if device.type == "cuda" and dtype.is_floating_point and dtype.itemsize > 1 else x

    return make


def backward(run: Callable[..., Tensor]) -> Callable[..., object]:
    """`run` and its backward pass: gradients of every floating-point argument that is a tensor."""

    def both(*arguments: object) -> object:
        leaves = [x.detach().requires_grad_() if _differentiable(x) else x for x in arguments]
        y = run(*leaves)
        wanted = [x for x in leaves if _differentiable(x)]
        return torch.autograd.grad(y, wanted, torch.empty_like(y), allow_unused=True)

    return both


def _differentiable(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
