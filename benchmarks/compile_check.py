"""Compiles every kernel at production shapes, without a GPU, and holds the result against the checked-in tables.

    python -m benchmarks.compile_check [--write]

Every launch of every case in `benchmarks/operators` is built for sm_90 and disassembled; each kernel is also built once
for sm_80, sm_100 and gfx942. All of it by the installed Triton; sm_90 by Triton 3.6.0 too, which comes with torch 2.11.
That one is looked for in build/triton-3.6.0, or where LOCKSTEP_TRITON_360 says:

    pip install --no-deps --target build/triton-3.6.0 triton==3.6.0

Never allowed: spilled registers, a stack, more shared memory than there is, approximate division, TF32, float atomics,
a binary or a tile that follows the number of rows. What is allowed but must not change unseen is in the tables:
registers, kinds of matrix instructions, floating-point instructions. --write makes them anew; read their diff.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compile_inspect import DISASSEMBLED
from benchmarks.compile_table import Result, differences, read_table, table_path, to_table, write_table
from benchmarks.operators.case import TARGETS

ROOT = Path(__file__).parent.parent
OLDEST = "3.6.0"
PROCESSES = 2
MISSING = (
    f"Triton {OLDEST} was not checked, because it is not there: "
    f"pip install --no-deps --target build/triton-{OLDEST} triton=={OLDEST}"
)


@dataclass(frozen=True)
class Build:
    """One process: a version of Triton and a target. folder: where this version is, None for the installed one."""

    version: str
    folder: Path | None
    target: str


def oldest_folder() -> Path:
    """Where Triton 3.6.0 should be."""
    return Path(os.environ.get("LOCKSTEP_TRITON_360", ROOT / "build" / f"triton-{OLDEST}"))


def planned() -> list[Build]:
    """The builds that this machine can do, the longest first."""
    folder, newest = oldest_folder(), importlib.metadata.version("triton")
    builds = [Build(newest, None, DISASSEMBLED)]
    if newest == OLDEST:
        return builds
    if (folder / "triton").is_dir():
        builds.append(Build(OLDEST, folder, DISASSEMBLED))
    return builds + [Build(newest, None, target) for target in TARGETS if target != DISASSEMBLED]


def run_builds(builds: Sequence[Build], modules: Sequence[str] = ()) -> dict[str, list[Result]]:
    """The results of each version. Raises RuntimeError with the end of the log of a build that failed."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        results = list(pool.map(lambda build: _run(build, modules), builds))
    found: dict[str, list[Result]] = {}
    for build, result in zip(builds, results, strict=True):
        found.setdefault(build.version, []).append(result)
    return found


def _run(build: Build, modules: Sequence[str]) -> Result:
    command = [sys.executable, "-m", "benchmarks.compile_worker", build.target, *modules]
    done = subprocess.run(command, cwd=ROOT, env=_environment(build), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Triton {build.version}, {build.target}:\n{done.stderr[-4000:]}")
    result: Result = json.loads(done.stdout)
    assert result["triton"] == build.version, f"{build} was built by Triton {result['triton']}"
    return result


def _environment(build: Build) -> Mapping[str, str]:
    path = [str(folder) for folder in (ROOT, build.folder) if folder]
    outer = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {**outer, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def problems(results: Sequence[Result]) -> list[str]:
    """One line for each kernel that is as it must not be, whatever the table says."""
    return [
        f"{result['target']} {name}: {what} (first launched by {result['cases'].get(name, 'several cases')})"
        for result in results
        for name, found in result["problems"].items()
        for what in found
    ]


def check(version: str, results: Sequence[Result], write: bool) -> list[str]:
    """Problems of one version of Triton and, unless they are accepted by `write`, differences from its table.

    A version without a table is held to the rules alone.
    """
    path, table = table_path(version), to_table(results)
    expected = read_table(path)
    if write:
        write_table(path, table)
    compared = not write and expected is not None
    return problems(results) + (differences(expected or {}, table) if compared else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make the tables anew")
    args = parser.parse_args()
    builds = planned()
    lines = []
    for version, results in run_builds(builds).items():
        kernels = sum(len(result["kernels"]) for result in results)
        print(f"Triton {version}: {kernels} binaries for {', '.join(result['target'] for result in results)}")
        lines += [f"Triton {version}, {line}" for line in check(version, results, args.write)]
    if OLDEST not in {build.version for build in builds}:
        lines.append(MISSING)
    print("\n".join(lines) or ("tables written" if args.write else "as in the tables"))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
