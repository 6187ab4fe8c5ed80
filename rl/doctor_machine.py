"""Doctor's look at the machine: versions, platform, threads, memory and disk. Nothing here starts Ray."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import ops
from rl.doctor_check import Check

DISTRIBUTION = "lockstep-rl"
IMPORTED = {"torch": "torch", "ray": "ray", "transformers": "transformers", "math-verify": "math_verify"}
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86 with tiles, ARM
GIB = 2**30
MIN_FREE_DISK, MIN_SHARED_MEMORY, MIN_MEMORY = 2 * GIB, 1 * GIB, 4 * GIB


def machine_checks(threads: int) -> list[Check]:
    """threads: how many CPU threads a run would use."""
    checks = [*_version_checks(), _platform_check(), _threads_check(threads), _openmp_check()]
    return [*checks, *_cpu_flags(), *_memory_check(), *_disk_checks()]


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version_checks() -> list[Check]:
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return [Check("lockstep", False, f"{DISTRIBUTION} is not installed", "run `pip install -e .` in the checkout")]
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    ranges = {requirement.name: requirement.specifier for requirement in requirements if requirement.marker is None}
    python = _version_check("python", platform.python_version(), SpecifierSet(metadata["Requires-Python"]))
    return [python, *(_library_check(name, module, ranges[name]) for name, module in IMPORTED.items())]


def _library_check(name: str, module: str, supported: SpecifierSet) -> Check:
    try:
        importlib.import_module(module)
        version = importlib.metadata.version(name)
    except (ImportError, OSError) as error:  # OSError: a shared library of the package does not load.
        return Check(name, False, f"cannot be imported: {error}", f"run `pip install '{name}{supported}'`")
    return _version_check(name, version, supported)


def _version_check(name: str, version: str, supported: SpecifierSet) -> Check:
    """Soft: another version may well work, and whether alignment holds under it is what the other checks find out."""
    passed = supported.contains(version, prereleases=True)
    detail = f"{version} (supported: {supported})"
    return Check(name, passed, detail, f"install a {name} in the range {supported}", soft=True)


def _platform_check() -> Check:
    tested = platform.system() == "Linux"
    return Check("platform", tested, platform.platform(), "only Linux is tested; trust the checks below", soft=True)


def _threads_check(threads: int) -> Check:
    cores = available_cores()
    detail = f"{threads} threads on {cores} cores, load {os.getloadavg()[0]:.1f}"
    return Check("threads", threads <= cores, detail, f"use at most {cores} threads; more only take turns", soft=True)


def _openmp_check() -> Check:
    found = ops.has_openmp()
    detail = "share their work among OpenMP threads" if found else "take one thread: Numba finds no libgomp.so.1.0.0"
    return Check("compiled operators", found, detail, "install GNU OpenMP (apt install libgomp1)", soft=True)


def _cpu_flags() -> Iterator[Check]:
    """For the reader only: what counts is the measured speed behind the choice of dtype."""
    if flags := _proc_values("/proc/cpuinfo", ("flags", "Features")):
        present = [flag for flag in BF16_FLAGS if flag in flags.split()]
        units = ", ".join(present) or "none"
        yield Check("cpu", True, f"bfloat16 units: {units}; multiplied in {ops.bf16_products()}")


def _memory_check() -> Iterator[Check]:
    if available := _proc_values("/proc/meminfo", ("MemAvailable",)):
        remedy = "close other programs, or lower rollout.memory_mb and trainer.token_budget"
        yield _room_check("memory", int(available.split()[0]) * 1024, MIN_MEMORY, "available", remedy)


def _disk_checks() -> Iterator[Check]:
    free = "free it, or start the run from a folder on another disk"
    yield _room_check("disk, run folder", shutil.disk_usage(Path.cwd()).free, MIN_FREE_DISK, f"in {Path.cwd()}", free)
    temporary = tempfile.gettempdir()
    remedy = "free it, or point TMPDIR elsewhere; Ray spills and logs there"
    yield _room_check(
        "disk, temporary files", shutil.disk_usage(temporary).free, MIN_FREE_DISK, f"in {temporary}", remedy
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        remedy = (
            "free it, or give a container more (docker run --shm-size=2g); Ray passes weights and rollouts through it"
        )
        yield _room_check("shared memory", shutil.disk_usage(shared).free, MIN_SHARED_MEMORY, f"in {shared}", remedy)


def _room_check(name: str, free: int, least: int, where: str, remedy: str) -> Check:
    detail = f"{free / GIB:.1f} GiB {where}, at least {least / GIB:.0f} advised"
    return Check(name, free >= least, detail, remedy, soft=True)


def _proc_values(path: str, keys: tuple[str, ...]) -> str:
    """The first value of one of the keys in a Linux /proc table; empty on other systems."""
    if not Path(path).is_file():
        return ""
    lines = (line.partition(":") for line in Path(path).read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() in keys), "")
