"""What a group costs: 16 samples of one prompt of 1,000 tokens, against one sample, and against 16 requests that share
nothing.

    python -m benchmarks.group [--out FOLDER] [--quick]

Every sample ends with its first token, so that the time is the prompt's. The engine's cache of prefixes is off: what is
shared is shared because it is one request. The three take turns; ratios are medians over rounds. Written to group.json.
"""

import time
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from benchmarks.common import arguments, quickstart_config, rates, ring_10m_config, write_result
from policy.config import PolicyConfig
from policy.transformer import Policy
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Request, SamplingParams


@dataclass(frozen=True)
class Load:
    prompt: int = 1000
    group: int = 16
    repeats: int = 5


QUICK = Load(prompt=100, group=4, repeats=2)


def measure(config: PolicyConfig, load: Load) -> dict[str, list[float]]:
    """Seconds of every round: of one sample, of a group, and of as many requests alone."""
    policy = Policy(config, torch.bfloat16)
    policy.initialize(seed=0)
    engine = Engine(policy.to_working_dtype(), RolloutConfig(max_batch=load.group, memory_mb=1024, prefix_cache=False))
    ids = np.random.default_rng(0).integers(1, config.vocab_size, load.prompt)
    sampling = SamplingParams(1)
    sides = {
        "one": [Request(0, ids, 1, sampling, seed=0)],
        "group": [Request(0, ids, load.group, sampling, seed=0)],
        "alone": [Request(i, ids, 1, sampling, seed=0, prompt=i) for i in range(load.group)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(load.repeats + 1):
        for name, requests in sides.items():
            start = time.perf_counter()
            engine.generate(requests)
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    args = arguments(__doc__)
    load, config = (QUICK, quickstart_config()) if args.quick else (Load(), ring_10m_config())
    seconds = measure(config, load)
    ratio = {
        name: median(times / one for times, one in zip(seconds[name], seconds["one"], strict=True)) for name in seconds
    }
    result = {"load": vars(load), "rounds_per_second": {n: rates(1, times) for n, times in seconds.items()}}
    path = write_result(args, "group", result | {"ratio_to_one": ratio})
    print(
        f"prompt of {load.prompt} tokens: one sample {1e3 * median(seconds['one']):.0f} ms, a group of {load.group} "
        f"{ratio['group']:.2f}x of it, {load.group} requests alone {ratio['alone']:.2f}x"
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
