"""Python imports this by itself where this folder is on PYTHONPATH: SGLang on a CPU, without torchvision and vLLM.

SGLang 0.5.23 imports both whatever it serves: torchvision for models that see, vLLM for kernels that its plain CPU path
does not call. Here every attribute of theirs is a class that does nothing, as it is in the processes SGLang spawns.

It records experts in memory that it pins for a GPU, wherever it runs; here that memory stays as it is.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

ABSENT = ("torchvision", "vllm")
PINNING = "sglang.srt.mem_cache.pool_host.common"


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


class _Nothing(metaclass=_Anything):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass


class _Stub(ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in ABSENT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Unpinned(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        vars(module)["_cuda_host_register"] = lambda *arguments: None


class _PinningFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == PINNING else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Unpinned(fullname, spec.origin)
        return spec


sys.meta_path.insert(0, _PinningFinder())
sys.meta_path.append(_Finder())  # last, so that a real one goes before
