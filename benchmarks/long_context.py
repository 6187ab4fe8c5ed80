"""Time against context length: a small Ring-linear hybrid and its all-softmax sibling (the report's Figures 7 and 8).

    python -m benchmarks.long_context [--out FOLDER] [--quick]

Equal width, layers and heads; the hybrid has lightning attention in 4 of 5 layers, as Ring-mini-linear-2.0 has. One
sequence is prefilled in pieces of 2,048 tokens up to 65,536; at every power of two from 1,024 on some tokens are
decoded and forgotten again. Both policies take turns at each piece. Random weights, FP32. Written to long_context.json
and long_context.svg.

The report (arXiv 2510.19338, Figures 7 and 8) has over 2.5 times the prefill and over 2 times the decode throughput of
its softmax siblings at 128K, on GPUs, with other widths: only the shape of the curves can be compared.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import ops
from benchmarks.common import arguments, write_result
from policy.cache import CachePools, CacheView
from policy.config import PolicyConfig
from policy.transformer import Policy

CHUNK = 128
REPORT = {"prefill": 2.5, "decode": 2.0}  # times, at 128K


@dataclass(frozen=True)
class Load:
    longest: int = 1 << 16
    shortest: int = 1 << 10
    piece: int = 2048
    decoded: int = 24  # tokens at each length, less than a chunk

    @property
    def lengths(self) -> list[int]:
        return [1 << n for n in range(self.shortest.bit_length() - 1, self.longest.bit_length())]


QUICK = Load(longest=1 << 9, shortest=1 << 8, piece=128, decoded=2)


def hybrid_config(load: Load) -> PolicyConfig:
    return PolicyConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=5,
        layer_group_size=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        first_k_dense_replace=5,
        max_position_embeddings=load.longest + CHUNK,
        chunk_size=CHUNK,
    )


class Reader:
    """One sequence in the cache, which is read on in pieces and decoded from without a trace."""

    def __init__(self, config: PolicyConfig) -> None:
        policy = Policy(config, torch.float32)
        policy.initialize(seed=0)
        self.policy, blocks = policy.to_working_dtype(), config.max_position_embeddings // config.chunk_size
        self.pools = CachePools(config, 1, blocks, policy.dtype, policy.device)
        self.table, self.slots = torch.arange(blocks)[None], torch.zeros(1, dtype=torch.int64)
        self.ids = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, 1 << 17))

    @torch.no_grad()
    def read(self, begin: int, end: int) -> float:
        """Seconds for the tokens from `begin` to `end` in one forward."""
        start = time.perf_counter()
        layout = ops.ChunkLayout.build([end - begin], CHUNK, [begin])
        table = self.table[:, : -(-end // CHUNK)]
        self.policy(self.ids[begin:end], layout, CacheView(self.pools, self.slots, table))
        return time.perf_counter() - start


def measure(configs: dict[str, PolicyConfig], load: Load) -> dict[str, dict[str, list[float]]]:
    """By policy: seconds of a prefill of each length, and of a decoded token behind it."""
    readers = {name: Reader(config) for name, config in configs.items()}
    prefill: dict[str, float] = defaultdict(float)
    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in readers}
    for reader in readers.values():
        reader.read(0, load.piece), reader.read(0, 1)
    edges = sorted({*range(0, load.longest + 1, load.piece), *load.lengths})
    for begin, end in pairwise(edges):
        for name, reader in readers.items():
            prefill[name] += reader.read(begin, end)
            if end in load.lengths:
                tokens = [reader.read(end + i, end + i + 1) for i in range(load.decoded)]
                seconds[name]["prefill"].append(prefill[name])
                seconds[name]["decode"].append(median(tokens))
    return seconds


def ratios(seconds: dict[str, dict[str, list[float]]], kind: str) -> list[float]:
    """Softmax over hybrid, by length."""
    return [s / h for s, h in zip(seconds["softmax"][kind], seconds["hybrid"][kind], strict=True)]


def crossover(lengths: Sequence[int], values: Sequence[float]) -> int | None:
    """The shortest length from which on the hybrid is always faster."""
    slower = [length for length, ratio in zip(lengths, values, strict=True) if ratio <= 1]
    later = [length for length in lengths if not slower or length > slower[-1]]
    return later[0] if later else None


def plot(path: Path, lengths: list[int], seconds: dict[str, dict[str, list[float]]]) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, kind, unit in zip(figure.subplots(1, 2), ("prefill", "decode"), (1.0, 1e3), strict=True):
        for name, times in seconds.items():
            axes.plot(lengths, [unit * value for value in times[kind]], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths])
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("prefill, s" if kind == "prefill" else "a decoded token, ms")
        axes.set_title(f"{kind}: {ratios(seconds, kind)[-1]:.1f}x at {lengths[-1]:,}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    args = arguments(__doc__)
    load = QUICK if args.quick else Load()
    hybrid = hybrid_config(load)
    configs = {"hybrid": hybrid, "softmax": dataclasses.replace(hybrid, layer_group_size=1)}
    seconds = measure(configs, load)
    result: dict[str, Any] = {"lengths": load.lengths, "seconds": seconds, "report_at_128k": REPORT}
    for kind in ("prefill", "decode"):
        values = ratios(seconds, kind)
        result[kind] = {"ratio": values, "crossover": crossover(load.lengths, values)}
        print(
            f"{kind}: softmax / hybrid {', '.join(f'{value:.2f}' for value in values)} at "
            f"{', '.join(map(str, load.lengths))} tokens; faster from {result[kind]['crossover']} on "
            f"(report: over {REPORT[kind]}x at 128K)"
        )
    path = write_result(args, "long_context", {"policy": dataclasses.asdict(hybrid), **result})
    plot(path.with_suffix(".svg"), load.lengths, seconds)
    print(f"written to {path} and {path.with_suffix('.svg').name}")


if __name__ == "__main__":
    main()
