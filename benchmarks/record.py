"""Where a result comes from: date, commit, command, processor and versions, for the file that it is written to."""

import datetime
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def origin(benchmark: str, libraries: Sequence[str]) -> dict[str, Any]:
    """What every result file opens with; libraries: the distributions whose versions matter."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        "device": {"cpu": _cpu_model(), "threads": torch.get_num_threads(), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), **{library: version(library) for library in libraries}},
    }


def commit() -> str:
    """The checked-out commit, with -dirty when the files differ from it; "none" before the first."""
    head = output("git", "rev-parse", "--verify", "--quiet", "HEAD") or "none"
    return head + ("-dirty" if output("git", "status", "--porcelain") else "")


def output(*command: str) -> str:
    """Standard output; empty when the command fails or does not exist."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _cpu_model() -> str:
    lines = [line.partition(":") for line in output("lscpu").splitlines()]
    facts = {key.strip(): value.strip() for key, _, value in lines}
    return f"{facts.get('Model name', platform.machine())}, {facts.get('CPU(s)', '?')} cores"
