"""What the benchmarks share: timings in turn, the shapes measured, and a result file that says where it is from."""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from policy.config import PolicyConfig
from rl.config import load_recipe

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
LIBRARIES = ("torch", "transformers", "numpy")


def quickstart_config() -> PolicyConfig:
    """The policy of recipes/quickstart.yaml."""
    policy = load_recipe(QUICKSTART).policy
    return PolicyConfig.from_hf(
        {**policy.config, "vocab_size": policy.vocab_size, "lockstep": {"chunk_size": policy.chunk_size}}
    )


def ring_10m_config() -> PolicyConfig:
    """About 10 million parameters, laid out as the quickstart; the 2 + 1 experts of a token are together 768 wide."""
    return PolicyConfig(
        vocab_size=4096,
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        group_norm_size=4,
        intermediate_size=768,
        moe_intermediate_size=256,
        moe_shared_expert_intermediate_size=256,
        n_group=2,
        chunk_size=quickstart_config().chunk_size,
    )


def alternate(one: Callable[[], object], two: Callable[[], object], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each, in turn after one untimed run of both, so that a slow minute of the machine falls on both."""
    one(), two()
    pairs = [(_seconds(one), _seconds(two)) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rates(amount: float, seconds: list[float]) -> dict[str, Any]:
    """Amount per second of every run, and the median over runs."""
    return {"median": median(amount / s for s in seconds), "runs": [amount / s for s in seconds]}


def arguments(description: str | None) -> argparse.Namespace:
    """out: the folder of the result file; quick."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works; the numbers mean nothing")
    return parser.parse_args()


def write_result(args: argparse.Namespace, name: str, result: Mapping[str, Any]) -> Path:
    """Writes NAME.json: the result under the date, commit, device and versions it was measured with."""
    record = {
        "benchmark": name,
        "quick": args.quick,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "device": {"cpu": _cpu_model(), "threads": torch.get_num_threads(), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), **{library: version(library) for library in LIBRARIES}},
        **result,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path: Path = args.out / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def _commit() -> str:
    """The checked-out commit, with -dirty when the files differ from it; "none" before the first."""
    head = _output("git", "rev-parse", "--verify", "--quiet", "HEAD") or "none"
    return head + ("-dirty" if _output("git", "status", "--porcelain") else "")


def _cpu_model() -> str:
    lines = [line.partition(":") for line in _output("lscpu").splitlines()]
    facts = {key.strip(): value.strip() for key, _, value in lines}
    return f"{facts.get('Model name', platform.machine())}, {facts.get('CPU(s)', '?')} cores"


def _output(*command: str) -> str:
    """Standard output; empty when the command fails or does not exist."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
