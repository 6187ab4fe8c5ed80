"""Loads and calls a user's reward function. Only `reward.worker` does so in a run: the code may hang or die."""

import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from reward.protocol import Reply
from reward.result import Reason


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:name` or `package.module:name` names. Raises ValueError if there is none."""
    source, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"a function is named FILE.py:NAME or MODULE:NAME, got {spec!r}")
    module = _load(source)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{source} has no function {name!r}; it has {', '.join(_functions(module)) or 'none'}")
    return function


def call_function(function: Callable[..., Any], /, **arguments: Any) -> Reply:
    """The number that it returns for these keyword arguments, or what went wrong."""
    try:
        value = function(**arguments)
        if not isinstance(value, Real):
            return Reply(Reason.USER_ERROR, f"returned {type(value).__name__} {value!r:.80}; it must return a number")
        number = float(value)
    except MemoryError:
        raise
    except Exception as error:  # it is the user's code, so every error is its author's to read
        return Reply(Reason.USER_ERROR, _describe(error))
    if not math.isfinite(number):
        return Reply(Reason.USER_ERROR, f"returned {number}; it must return a finite number")
    return Reply(Reason.OK, value=number)


def _describe(error: Exception) -> str:
    """`ValueError: no such key (my_rewards.py, line 12)`: the error's first line, and the line of the user's file."""
    what = traceback.format_exception_only(error)[-1].partition("\n")[0]
    if isinstance(error, SyntaxError):
        return f"{what} ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    return f"{what} ({Path(frames[0].filename).name}, line {lines[-1]})" if frames else what


def _is_ours(filename: str) -> bool:
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen importlib")


def _load(source: str) -> ModuleType:
    try:
        return _load_file(Path(source)) if source.endswith(".py") else _import(source)
    except MemoryError:
        raise
    except Exception as error:  # see call_function
        raise ValueError(f"cannot load {source}: {_describe(error)}") from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no such file in {os.getcwd()}")
    sys.path.insert(0, str(path.resolve().parent))  # so that it can import what lies beside it, as a script can
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _functions(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
