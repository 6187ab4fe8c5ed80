"""Other operators in the policy's forward, for as long as a block lasts: to record them, or to try a hypothesis."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from policy import transformer


class _Overlay:
    """The operator library with some functions replaced."""

    def __init__(self, base: Any, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._base, self._functions = base, functions

    def __getattr__(self, name: str) -> Any:
        return self._functions[name] if name in self._functions else getattr(self._base, name)


def operator(name: str) -> Callable[..., Any]:
    """The function that the policy's forward calls under this name now."""
    found: Callable[..., Any] = getattr(vars(transformer)["ops"], name)
    return found


@contextmanager
def replace_operators(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within the block every policy of this process calls `functions` in place of the operators of these names."""
    module = vars(transformer)
    before = module["ops"]
    module["ops"] = _Overlay(before, functions)
    try:
        yield
    finally:
        module["ops"] = before
