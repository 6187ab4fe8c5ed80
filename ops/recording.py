"""Work on a CPU recorded once and replayed: what CUDA graphs are on a GPU.

The Python between some hundred small kernels takes longer than a small batch's kernels do. A recording holds the calls
that did the work, kernels of `ops.compiled` and operators of torch, each with the memory it read and wrote. What a
replay is to read anew, the caller writes into that memory first. Arithmetic in NumPy or in Python is not seen: its
results stay as they were.
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ops.compiled import watching
from ops.program import Program, is_kernel

_aten = torch.ops.aten
_MAKES_MEMORY = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided}
_INTO = {_aten.index_select.default: _aten.index_select.out, _aten.add.Tensor: _aten.add.out}
_FOLLOWS_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Recording:
    """compute: what is recorded; it runs once. Raises RuntimeError where its course depends on numbers in tensors."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.calls: list[partial[Any]] = []
        with watching(self.calls.append), _TorchCalls(self.calls):
            self.result = compute()
        self._steps: list[Callable[[], Any]] = []
        for kernels, group in groupby(self.calls, lambda call: is_kernel(call.func)):
            calls = [*group]
            self._steps += [Program(calls)] if kernels else calls

    def replay(self) -> None:
        """Computes the result anew, in the same memory."""
        for step in self._steps:
            step()

    def apart(self) -> list[tuple[str, Callable[[], Any]]]:
        """The same call by call, each with the module it comes from: for measurements."""
        return [(call.func.__module__, Program([call]) if is_kernel(call.func) else call) for call in self.calls]


class _TorchCalls(TorchDispatchMode):
    """Appends to `calls` what torch computes. Views and new memory are there already when it is replayed."""

    def __init__(self, calls: list[partial[Any]]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _FOLLOWS_NUMBERS.isdisjoint(operator.tags):
            raise RuntimeError(f"{operator} cannot be recorded: what it returns depends on the numbers in tensors")
        result = operator(*args, **kwargs)
        if operator.is_view or operator.overloadpacket in _MAKES_MEMORY:
            return result
        if operator._schema.is_mutable:
            self._calls.append(partial(operator, *args, **kwargs))
            return result
        self._calls.append(_again(operator, args, kwargs, result))
        return result


def _again(operator: Any, args: Any, kwargs: Any, result: Any) -> partial[Any]:
    """What computes the result once more, into its memory; at once if torch can."""
    if operator.overloadpacket is _aten._to_copy and result.shape == args[0].shape:
        return partial(_aten.copy_.default, result, args[0])
    if operator is _aten.embedding.default and args[1].ndim == 1:
        return partial(_aten.index_select.out, args[0], 0, args[1], out=result)
    if operator in _INTO:
        return partial(_INTO[operator], *args, **kwargs, out=result)
    return partial(_compute_again, operator, args, kwargs, tree_leaves(result))


def _compute_again(operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
    for output, value in zip(outputs, tree_leaves(operator(*args, **kwargs)), strict=True):
        output.copy_(value)
