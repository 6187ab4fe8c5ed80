"""Everything that a GPU is needed for, in one command: are the kernels right, aligned, and how fast.

    python -m benchmarks.gpu_suite [OPERATOR ...] [--out FILE] [--quick]

Needs torch, Triton, pytest, hypothesis and rich; no installation and no Ray. In this order:

1. the tests in tests/ops/kernels, on the GPU, and compiler faults that were reported elsewhere;
2. every production shape: 100 runs with equal bits, gradients too; rows alone with the bits they have in the batch;
3. times, only of what passed 1 and 2: medians of calls in turn with what a user would call instead (torch, cuBLAS,
   flash-linear-attention where it is installed) and with the operator's own unaligned form; the share of what the GPU
   reaches in a copy and in a large cuBLAS product; what was aimed at.

Writes one JSON file after every shape, so that a run cut short leaves what it found, and prints a table.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.compile_inspect import ptxas_version
from benchmarks.gpu_checks import Outcome, run_tests
from benchmarks.gpu_clock import CudaClock, describe_gpu, measure_peaks
from benchmarks.gpu_measure import FAILURES, QUICK, Bench, Effort, measure, say
from benchmarks.gpu_report import result_table
from benchmarks.gpu_risks import RISKS
from benchmarks.operators.case import Case, case_modules
from benchmarks.record import RESULTS, origin

NO_GPU = "no NVIDIA GPU here, which this suite measures; without one: pytest, and python -m benchmarks.compile_check"


def try_risks(tests: dict[str, Outcome], device: torch.device) -> dict[str, str | None]:
    """Runs the risks of the operators; what goes wrong counts as a failed test of its operator."""
    found: dict[str, str | None] = {}
    for name, (operator, check) in RISKS.items():
        if operator in tests:
            try:
                found[name] = check(device)
            except FAILURES as error:
                found[name] = say(error)
            if found[name]:
                tests[operator].failed.append(f"{name}: {found[name]}")
    return found


def run_suite(
    cases: Sequence[Case], bench: Bench, tests: dict[str, Outcome], save: Callable[[list[Any]], None]
) -> None:
    """Measures the cases one after another; `save` gets the records so far."""
    records: list[dict[str, Any]] = []
    save(records)
    for case in cases:
        print(case, flush=True)
        records.append(measure(case, tests[case.operator], bench))
        save(records)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", help="only these, such as linear; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_suite.json", help="the result file")
    parser.add_argument("--quick", action="store_true", help="few repeats, to see that it works")
    args = parser.parse_args()
    try:
        cases = choose_cases(args.operators)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    operators = sorted({case.operator for case in cases})
    tests = run_tests(operators, args.quick)
    bench = open_bench(QUICK if args.quick else Effort())
    report = {**origin("gpu_suite", ("torch", "triton", "numpy")), "quick": args.quick, **describe(bench)}
    report["risks"] = try_risks(tests, bench.device)
    report["tests"] = {operator: asdict(found) for operator, found in tests.items()}

    def save(records: list[Any]) -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**report, "cases": records}, indent=2) + "\n")

    run_suite(cases, bench, tests, save)
    return print_report(json.loads(args.out.read_text()), args.out)


def choose_cases(operators: Sequence[str]) -> list[Case]:
    """Raises ValueError for an operator without cases."""
    cases = [case for module in case_modules() for case in module.CASES]
    known = sorted({case.operator for case in cases})
    if unknown := sorted(set(operators) - set(known)):
        raise ValueError(f"no cases of {', '.join(unknown)}; there are cases of {', '.join(known)}")
    return [case for case in cases if not operators or case.operator in operators]


def open_bench(effort: Effort) -> Bench:
    clock = CudaClock()
    return Bench(torch.device("cuda"), clock, measure_peaks(clock, effort.rounds), effort)


def describe(bench: Bench) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    gpu = {**describe_gpu(), "assembler": ptxas_version(10 * major + minor)}
    return {"gpu": gpu, "peaks": dict(bench.peaks), "effort": asdict(bench.effort)}


def print_report(report: Mapping[str, Any], path: Path) -> int:
    """Returns the exit status: 1 when anything was refused."""
    console = Console()
    console.print(result_table(report))
    refused = [case for case in report["cases"] if "refused" in case]
    for case in refused:
        where = f"{case['operator']} {case['name']}, {case['shape']}"
        console.print(f"{where}: {case['refused']}", style="red", markup=False, soft_wrap=True)
    console.print(
        ", ".join(f"{name} {value}" for name, value in report["gpu"].items()), highlight=False, soft_wrap=True
    )
    console.print(f"{len(report['cases']) - len(refused)} shapes timed, {len(refused)} refused; {path}", soft_wrap=True)
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
