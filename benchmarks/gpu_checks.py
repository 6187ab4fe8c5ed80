"""What must hold on a GPU before an operator is timed: its tests, equal bits again and again, equal bits of rows alone.

A check returns None, or what is wrong in words.
"""

import copy
import itertools
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.operators.case import Case
from benchmarks.record import ROOT

TESTS = Path("tests/ops/kernels")
PROCESSES = 8
SEED = 0


@dataclass
class Outcome:
    """The tests of one operator."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def problem(self) -> str | None:
        if self.failed:
            return f"{len(self.failed)} of {len(self.failed) + self.passed} tests fail, the first {self.failed[0]}"
        return None if self.passed else "it has no test that ran"


def run_tests(operators: Sequence[str], quick: bool) -> dict[str, Outcome]:
    """Runs tests/ops/kernels/test_<operator>.py of each, those marked slow included unless `quick`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        files = [str(TESTS / f"test_{operator}.py") for operator in operators]
        options = ["-q", "-W", "default", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        # Not those of pyproject.toml, which ask for xdist.
        options += ["-o", "addopts=--import-mode=importlib", "-m", "not slow" if quick else "slow or not slow"]
        options += ["-n", str(PROCESSES)] if find_spec("xdist") else []  # most of the time goes into compiling
        subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, check=False)
        found = read_tests(report.read_text()) if report.is_file() else {}
    return {operator: found.get(operator, Outcome()) for operator in operators}


def read_tests(junit: str) -> dict[str, Outcome]:
    """By operator, from pytest's JUnit file; a test that was skipped proves nothing and is not counted."""
    found: dict[str, Outcome] = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        # A file that cannot be imported is a nameless class, and its path the name.
        where = (case.get("classname") or case.get("name") or "").replace("/", ".").removesuffix(".py")
        parts = reversed(where.split("."))
        operator = next((part.removeprefix("test_") for part in parts if part.startswith("test_")), where)
        tests = found.setdefault(operator, Outcome())
        if case.find("failure") is not None or case.find("error") is not None:
            tests.failed.append(case.get("name", ""))
        elif case.find("skipped") is None:
            tests.passed += 1
    return found


def make_inputs(case: Case, device: torch.device) -> tuple[object, ...]:
    """The same values each time."""
    torch.manual_seed(SEED)
    return case.inputs(device)


def repeats_differ(case: Case, device: torch.device, repeats: int) -> str | None:
    """Runs it `repeats` times on the same inputs; outputs, or gradients, and what it left of its inputs must have equal
    bits."""
    arguments = make_inputs(case, device)
    first = list(tensors(_run(case, arguments)))
    for repeat in range(1, repeats):
        again = list(tensors(_run(case, arguments)))
        for place, (one, other) in enumerate(zip(first, again, strict=True)):
            if not same_bits(one, other):
                return f"output {place} of run {repeat + 1} of {repeats} differs from the first"
    return None


def rows_differ(case: Case, device: torch.device) -> str | None:
    """Runs it on parts of its rows, where it says how to; they must have the bits that they have among all."""
    if case.rows is None:
        return None
    arguments = make_inputs(case, device)
    whole, unit = list(tensors(_run(case, arguments)[0])), case.rows.outputs
    for which in _parts(case.rows.count):
        part = list(tensors(_run(case, case.rows.take(arguments, which))[0]))
        outputs = slice(which.start * unit, which.stop * unit)
        pairs = [(x[outputs], y) for x, y in zip(whole, part, strict=True) if len(x) == case.rows.count * unit]
        assert pairs, f"no output of {case} has {case.rows.count * unit} rows"
        if not all(same_bits(x, y) for x, y in pairs):
            return f"rows {which.start} to {which.stop - 1} of {case.rows.count} differ when they are alone"
    return None


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Of two tensors of one shape and dtype; NaN equals itself."""
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    return torch.equal(*(each.reshape(-1).contiguous().view(torch.uint8) for each in (x, y)))


def tensors(x: object) -> Iterator[Tensor]:
    """All in a nest of tuples, lists and dataclasses."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple | list):
        yield from itertools.chain.from_iterable(map(tensors, x))
    elif is_dataclass(x) and not isinstance(x, type):
        yield from itertools.chain.from_iterable(tensors(getattr(x, each.name)) for each in fields(x))


def _run(case: Case, arguments: tuple[object, ...]) -> tuple[object, tuple[object, ...]]:
    """The result, and the arguments after the call: copies, because a cache among them is another then."""
    arguments = copy.deepcopy(arguments)
    return case.run(*arguments), arguments


def _parts(count: int) -> list[slice]:
    """The first, the last, one and few in the middle, each half."""
    middle, third, few = count // 2, count // 3, min(17, count - count // 3)
    bounds = [(0, 1), (count - 1, count), (middle, middle + 1), (third, third + few), (0, middle), (middle, count)]
    return [slice(begin, end) for begin, end in dict.fromkeys(bounds) if begin < end]
