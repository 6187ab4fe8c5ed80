"""What the benchmarks share: timings in turn, the shapes measured, and a result file that says where it is from."""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.record import RESULTS, ROOT, origin
from policy.config import PolicyConfig
from rl.config import load_recipe

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
    return parser_of(description).parse_args()


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """out: the folder of the result file; quick."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works; the numbers mean nothing")
    return parser


def write_result(args: argparse.Namespace, name: str, result: Mapping[str, Any]) -> Path:
    """Writes NAME.json: the result under the date, commit, device and versions it was measured with."""
    record = {**origin(name, LIBRARIES), "quick": args.quick, **result}
    args.out.mkdir(parents=True, exist_ok=True)
    path: Path = args.out / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
