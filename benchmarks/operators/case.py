"""A production shape of an operator: what the compile check builds and what the GPU suite times.

Each module beside this one lists the cases of an operator in `CASES`. A case runs the public function, through
whichever path is in force; inputs may be uninitialised memory of full model size, so nothing depends on their values.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

import torch
from torch import Tensor

Arguments = tuple[Any, ...]

# GPUs that kernels are compiled for; a module's own TARGETS restrict them.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
NVIDIA_TARGETS = ("sm_80", "sm_90", "sm_100")
FP8_TARGETS = ("sm_90", "sm_100")  # those whose tensor cores know e4m3


@dataclass(frozen=True)
class Rows:
    """The same call on some of its rows (tokens or sequences), which must give these rows the same bits."""

    count: int
    take: Callable[[Arguments, slice], Arguments]
    outputs: int = 1  # rows of an output for each of them


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
    rows: Rows | None = None

    def __str__(self) -> str:
        return f"{self.operator} {self.name}, {self.shape}"

    def targets(self, module: ModuleType) -> tuple[str, ...]:
        """The GPUs it is compiled for, as one of the cases of `module`."""
        able = FP8_TARGETS if self.dtype == "float8" else TARGETS
        return tuple(target for target in getattr(module, "TARGETS", TARGETS) if target in able)


def case_modules(names: Sequence[str] = ()) -> list[ModuleType]:
    """The modules beside this one that list cases, or those of these dotted names."""
    found = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path != Path(__file__))
    return [importlib.import_module(name) for name in names or [f"benchmarks.operators.{stem}" for stem in found]]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[torch.device], Tensor]:
    """Values in [-1, 1] on a GPU; untouched memory, which costs nothing, where nothing is computed."""

    def make(device: torch.device) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        return x.uniform_(-1, 1) if device.type == "cuda" and dtype.is_floating_point and dtype.itemsize > 1 else x

    return make


def rows_at(count: int, *places: int) -> Rows:
    """The arguments at these places, tensors or dataclasses of them, have one row for each of `count` tokens."""

    def take(arguments: Arguments, which: slice) -> Arguments:
        return tuple(_rows(x, which) if place in places else x for place, x in enumerate(arguments))

    return Rows(count, take)


def _rows(x: object, which: slice) -> object:
    if isinstance(x, Tensor):
        return x[which]
    assert is_dataclass(x) and not isinstance(x, type), f"{type(x)} has no rows"
    return replace(x, **{each.name: _rows(getattr(x, each.name), which) for each in fields(x)})


def backward(run: Callable[..., Tensor]) -> Callable[..., object]:
    """`run` and its backward pass: gradients of every floating-point argument that is a tensor; y is its own gradient,
    which is at hand and the same each time."""

    def both(*arguments: object) -> object:
        leaves = [x.detach().requires_grad_() if _differentiable(x) else x for x in arguments]
        y, wanted = run(*leaves), [x for x in leaves if _differentiable(x)]
        return torch.autograd.grad(y, wanted, y.detach(), allow_unused=True)

    return both


def _differentiable(x: object) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.is_floating_point()
