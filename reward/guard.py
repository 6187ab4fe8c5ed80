"""Shuts a verifying worker's doors once it is ready: from then on it computes, and imports from Python's own folders.

sympy turns text into numbers by building a program and evaluating it. Here it reads numbers and refuses the rest, so
no text is ever evaluated. Behind that stand an audit hook, which ends the process before anything is opened, run or
connected to, and limits that the kernel keeps.
"""

import os
import re
import resource
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NoReturn

import sympy.parsing.sympy_parser
from sympy import Float, Integer
from sympy.core.sympify import SympifyError

from reward.protocol import Reply
from reward.result import Reason

# Events that open, run and reach nothing.
_HARMLESS = frozenset(
    {
        "array.__new__",
        "builtins.id",
        "code.__new__",
        "function.__new__",
        "import",
        "marshal.loads",
        "object.__delattr__",
        "object.__getattr__",
        "object.__setattr__",
        "sys._getframe",
        "sys.excepthook",
        "sys.unraisablehook",
    }
)
# Modules that write code of their own, from names and counts: classes, and sympy's monomial arithmetic.
_CODE_WRITERS = ("/dataclasses.py", "/collections/__init__.py", "/typing.py", "/sympy/polys/monomials.py")
_IMPORTER = "<frozen importlib._bootstrap>"
_SPARE_FILES = 8

_NUMBER = re.compile(r"[0-9]+|[0-9]*\.[0-9]+|[0-9]+\.")


def shut(reply_fd: int) -> None:
    """From now on, whatever would open, run or reach something sends `forbidden` to `reply_fd` and ends the process."""
    sympy.parsing.sympy_parser.parse_expr = _read_number
    folders = tuple(os.path.realpath(path) + os.sep for path in (*sys.path, sys.prefix, sys.base_prefix) if path)
    open_files = max(int(name) for name in os.listdir("/proc/self/fd"))
    for limit, value in (
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, open_files + _SPARE_FILES),
    ):
        resource.setrlimit(limit, (value, value))
    sys.dont_write_bytecode = True
    sys.addaudithook(_hook(folders, reply_fd))


def _hook(folders: tuple[str, ...], reply_fd: int) -> Callable[[str, tuple[Any, ...]], None]:
    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _HARMLESS and not _is_allowed(event, arguments, folders):
            _end(reply_fd, event, arguments)

    return check


def _is_allowed(event: str, arguments: tuple[Any, ...], folders: tuple[str, ...]) -> bool:
    if event == "open":
        path, _, flags = arguments
        return _is_inside(path, folders) and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if event in ("os.listdir", "os.scandir"):
        return _is_inside(arguments[0], folders)
    if event in ("compile", "exec"):
        return _is_code_of_ours(arguments, folders)
    return event == "resource.setrlimit" and arguments[0] == resource.RLIMIT_CPU  # the worker's own, for each item


def _is_inside(path: object, folders: tuple[str, ...]) -> bool:
    """Absolute paths only: relative to the right folder, the `<string>` of an evaluated text would be inside."""
    return isinstance(path, str) and os.path.isabs(path) and (os.path.realpath(path) + os.sep).startswith(folders)


def _is_code_of_ours(arguments: tuple[Any, ...], folders: tuple[str, ...]) -> bool:
    """Whether the code is a file's, or asked for by an import or by a module that is known to write code."""
    filename = arguments[0].co_filename if isinstance(arguments[0], CodeType) else arguments[-1]
    if filename.startswith("<frozen ") or _is_inside(filename, folders):
        return True
    frame: FrameType | None = sys._getframe(3)
    if frame is not None and frame.f_code.co_filename.endswith(_CODE_WRITERS):
        return True
    while frame is not None and frame.f_code.co_filename != _IMPORTER:
        frame = frame.f_back
    return frame is not None


def _end(reply_fd: int, event: str, arguments: tuple[Any, ...]) -> NoReturn:
    message = f"the verifier was led to {event} {arguments[:1]!r:.200}"
    os.write(reply_fd, Reply(Reason.FORBIDDEN, message, retire=True).encode())
    os._exit(1)


def _read_number(text: str, *_: object, **__: object) -> Integer | Float:
    """In the place of sympy's parse_expr, which evaluates."""
    if not _NUMBER.fullmatch(text):
        raise SympifyError(text)
    return Float(text) if "." in text else Integer(text)
