"""Calls of compiled kernels one after another without Python between them. Private to `ops`.

To call a kernel from Python takes longer than many a kernel of a small batch: its arguments are looked at one by one
(5 microseconds a call in a decode step, 9 where weights have driven Python out of the cache). Here they are laid down
once, as words of memory, and for every list of argument types there is a little function that reads them and calls.
"""

import ctypes
import inspect
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from ops.compiled import prepare_team

try:
    import numba
    from llvmlite import binding
except ImportError:
    numba = None

_NUMBERS = {"i1", "i8", "i64", "float", "double"}  # of LLVM; arguments of other types are pointers

_RUN = """
define i32 @run(ptr %entries, ptr %blocks, i64 %count) {
start:
  br label %next
next:
  %i = phi i64 [ 0, %start ], [ %after, %call ]
  %left = icmp ult i64 %i, %count
  br i1 %left, label %call, label %done
call:
  %entry_at = getelementptr ptr, ptr %entries, i64 %i
  %block_at = getelementptr ptr, ptr %blocks, i64 %i
  %entry = load ptr, ptr %entry_at
  %block = load ptr, ptr %block_at
  %status = call i32 %entry(ptr %block)
  %after = add i64 %i, 1
  %good = icmp eq i32 %status, 0
  br i1 %good, label %next, label %done
done:
  %result = phi i32 [ 0, %next ], [ %status, %call ]
  ret i32 %result
}
"""
_engines: list[Any] = []  # they own the code


class Program:
    """calls: of kernels that have run with arguments of these types; KeyError else. Arrays stay where they are."""

    def __init__(self, calls: Sequence[partial[Any]]) -> None:
        self._calls, self._run = calls, _runner()
        prepared = [_prepare(call) for call in calls]
        self._blocks = [block for _, block in prepared]
        self._entries = np.array([entry for entry, _ in prepared], np.uint64)
        self._places = np.array([block.ctypes.data for block in self._blocks], np.uint64)
        self._arguments = self._entries.ctypes.data, self._places.ctypes.data, len(calls)

    def __call__(self) -> None:
        prepare_team()
        if self._run(*self._arguments):
            raise RuntimeError("a kernel failed where it is called without Python; run it alone to see the reason")


def is_kernel(function: object) -> bool:
    return numba is not None and isinstance(function, numba.core.dispatcher.Dispatcher)


@cache
def _runner() -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(_compile(_RUN, "run"))


def _prepare(call: partial[Any]) -> tuple[int, np.ndarray]:
    """Address of the function that makes the call, and the words that it reads: the kernel's address, its arguments."""
    kinds = tuple((x.dtype.char, x.ndim) if isinstance(x, np.ndarray) else type(x) for x in call.args)
    if (call.func, kinds) not in _targets:
        _targets[call.func, kinds] = _target(call.func, call.args)
    entry, address, count = _targets[call.func, kinds]
    words = [address]
    for x in call.args:
        if isinstance(x, np.ndarray):  # by reference, and nobody counts references
            words += (0, 0, x.size, x.itemsize, x.__array_interface__["data"][0], *x.shape, *x.strides)
        elif isinstance(x, np.float32):
            words.append(int(x.view(np.uint32)))
        elif isinstance(x, float):
            words.append(int(np.float64(x).view(np.int64)))
        else:
            words.append(int(x))
    assert len(words) == count, f"{call.func.__name__} takes {count} words, not {len(words)}"
    return entry, np.array(words, np.int64)


_targets: dict[tuple[Any, tuple[Any, ...]], tuple[int, int, int]] = {}


def _target(kernel: Any, arguments: tuple[Any, ...]) -> tuple[int, int, int]:
    """For arguments of these types: address of what calls the kernel, and of the kernel; how many words they are."""
    if kernel.py_func.__code__.co_flags & inspect.CO_VARARGS:  # which arrive as one tuple
        named = kernel.py_func.__code__.co_argcount
        arguments = *arguments[:named], tuple(arguments[named:])
    compiled = kernel.overloads[tuple(map(numba.typeof, arguments))]
    packer = compiled.target_context.get_arg_packer(compiled.fndesc.argtypes)
    kinds = tuple(str(kind) for kind in packer.argument_types)
    return _entry(kinds), compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name), 1 + len(kinds)


@cache
def _entry(kinds: tuple[str, ...]) -> int:
    """Address of a function i32 (words): calls what the first word points to, with the others as its arguments."""
    lines, passed = ["  %result = alloca ptr", "  %error = alloca ptr", "  %kernel = load ptr, ptr %words"], []
    for i, kind in enumerate(kinds):
        kind = kind if kind in _NUMBERS else "ptr"
        lines.append(f"  %at{i} = getelementptr i64, ptr %words, i64 {i + 1}")
        lines.append(f"  %value{i} = load {kind}, ptr %at{i}")
        passed.append(f"{kind} %value{i}")
    lines.append(f"  %status = call i32 %kernel(ptr %result, ptr %error, {', '.join(passed)})")
    return _compile("define i32 @entry(ptr %words) {\n" + "\n".join(lines) + "\n  ret i32 %status\n}\n", "entry")


def _compile(text: str, name: str) -> int:
    module = binding.parse_assembly(text)
    module.verify()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(name)
    return address
