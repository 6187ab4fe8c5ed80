"""Compiles every launch of every case for one GPU, without one: `python -m benchmarks.compile_worker sm_90`.

A driver that only pretends stands in for the GPU. The operators run as they are, on CPU tensors whose memory nobody
touches; each launch is compiled and not run. Prints one JSON object. `benchmarks.compile_check` starts one such process
for each target and each version of Triton, because what a process imports first decides both.
"""

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from benchmarks.compile_inspect import DISASSEMBLED, as_row, inspect, ptxas_version, violations
from benchmarks.operators.case import TARGETS, Arguments, Case, case_modules
from ops.dispatch import Path, force

GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
assert tuple(GPUS) == TARGETS

Configuration = dict[str, Any]  # types of the pointers, constants, warps and stages, by name


class PretendDriver(DriverBase):
    """All that Triton asks of a driver before a launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=0: 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise AssertionError("nothing is autotuned")


@dataclass
class Recorder:
    """What was launched: every binary under its full name, and the launches of the case that runs."""

    each_configuration: bool  # else a kernel is built only in the first that is launched
    kernels: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, str] = field(default_factory=dict)  # the one that asked for a binary first
    problems: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    launches: defaultdict[str, list[Configuration]] = field(default_factory=lambda: defaultdict(list))
    seen: set[tuple[Any, ...]] = field(default_factory=set)
    case: str = ""

    @contextmanager
    def installed(self) -> Iterator[None]:
        stock = JITFunction.run

        def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            if self._wanted(kernel, arguments):
                self._keep(stock(kernel, *arguments, grid=grid, warmup=True, **options))

        JITFunction.run = run
        try:
            yield
        finally:
            JITFunction.run = stock

    def _wanted(self, kernel: Any, arguments: tuple[Any, ...]) -> bool:
        key = (kernel.fn, *(x.dtype for x in arguments if isinstance(x, torch.Tensor)))
        new = key not in self.seen
        self.seen.add(key)
        return new or self.each_configuration

    def _keep(self, compiled: Any) -> None:
        kernel, configuration = kernel_name(compiled), configuration_of(compiled)
        name = " ".join([kernel, *(f"{key}={value}" for key, value in configuration.items())])
        self.launches[kernel].append(configuration)
        if name not in self.kernels:
            self.kernels[name], self.cases[name] = compiled, self.case
            self.problems[name] |= {
                f"integer {argument} is not named in jit(): some of its values get a binary of their own"
                for argument in specialised_integers(compiled)
            }
        elif self.kernels[name].hash != compiled.hash:
            self.problems[name].add("two binaries: the value or alignment of an argument decides")


def kernel_name(compiled: Any) -> str:
    function = compiled.src.fn
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def configuration_of(compiled: Any) -> Configuration:
    source, meta = compiled.src, compiled.metadata
    names = [parameter.name for parameter in source.fn.params]
    types = ",".join(ty.removeprefix("*") for ty in source.signature.values() if ty.startswith("*"))
    constants = {names[path[0]]: value for path, value in sorted(source.constants.items())}
    return {"types": types, **constants, "warps": meta.num_warps, "stages": meta.num_stages}


def specialised_integers(compiled: Any) -> list[str]:
    """Runtime integers for whose values (1, multiples of 16) Triton would build other binaries."""
    source = compiled.src
    runtime = [parameter for parameter in source.fn.params if not parameter.is_constexpr]
    integer = re.compile(r"[iu]\d+|constexpr")  # an integer 1 that may be specialised arrives as a constant
    return [p.name for p in runtime if integer.fullmatch(source.signature[p.name]) and not p.do_not_specialize]


def build(target: str, modules: list[ModuleType]) -> dict[str, Any]:
    """The result for `benchmarks.compile_check`: kernels, and what of them follows the number of rows."""
    gpu, thorough = GPUS[target], target == DISASSEMBLED
    triton.runtime.driver.set_active(PretendDriver(gpu))
    recorder = Recorder(each_configuration=thorough)
    follows: defaultdict[str, set[str]] = defaultdict(set)
    with recorder.installed(), force(Path.TRITON):
        for module in modules:
            for case in module.CASES:
                if target in case.targets(module):
                    whole = _launches(case, case.inputs(torch.device("cpu")), recorder)
                    if thorough and case.rows:
                        _compare_rows(case, whole, recorder, follows)
    rows = _inspected(recorder, target)
    return {
        "target": target,
        "triton": triton.__version__,
        "assembler": "" if gpu.backend == "hip" else ptxas_version(gpu.arch),
        "kernels": rows,
        "follows_rows": {kernel: " ".join(sorted(names)) for kernel, names in follows.items() if names},
        "cases": recorder.cases,
        "problems": {name: sorted(wrong) for name, wrong in recorder.problems.items() if wrong},
    }


def _launches(case: Case, arguments: Arguments, recorder: Recorder) -> dict[str, list[Configuration]]:
    recorder.case = str(case)
    recorder.launches.clear()
    print(case, file=sys.stderr, flush=True)  # the last line of a process that failed says where
    case.run(*arguments)
    return dict(recorder.launches)


def _compare_rows(
    case: Case, whole: dict[str, list[Configuration]], recorder: Recorder, follows: defaultdict[str, set[str]]
) -> None:
    """Which constants of each kernel are others for one row, for few, and for all but the first, at odd addresses."""
    assert case.rows
    count = case.rows.count
    for which in (slice(0, 1), slice(0, min(17, count)), slice(min(1, count - 1), count)):
        arguments = case.rows.take(case.inputs(torch.device("cpu")), which)
        for kernel, launches in _launches(case, arguments, recorder).items():
            for one, other in zip(whole.get(kernel, []), launches, strict=False):
                changed = {key for key in one if one[key] != other[key]}
                follows[kernel] |= changed
                if shape := {key for key in changed if key == "warps" or key.startswith("BLOCK")}:
                    recorder.problems[kernel].add(f"{' '.join(sorted(shape))} follows the number of rows in {case}")


def _inspected(recorder: Recorder, target: str) -> dict[str, dict[str, Any]]:
    rows = {}
    for name, kernel in recorder.kernels.items():
        binary = inspect(kernel, target)
        recorder.problems[name] |= set(violations(binary, target))
        rows[name] = as_row(binary)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("modules", nargs="*", help="such as benchmarks.operators.rope; all by default")
    args = parser.parse_args()
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "kernels must be compiled, not interpreted"
    torch.set_num_threads(1)
    print(json.dumps(build(args.target, case_modules(args.modules))))
