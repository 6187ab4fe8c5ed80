"""Where a step of the local engine goes, beside what the machine needs for its arithmetic and memory traffic alone.

    products     matrix products of the layers. Limit: at the rate of a large product
    attention    softmax and lightning. Limit: bytes of keys, values and states it reads / bandwidth
    elementwise  norms, rotation, SwiGLU, router, casts. No limit worth stating: the operands lie in the cache
    head, draw   LM head, log-probs, draw. Limit: the product at the rate of a large one
    prompts      steps that compute prompts, and the first of a batch size, until it is recorded
    rest         the engine's own Python

Decode steps are replayed from recordings (`ops.Recording`), whose calls are timed one by one.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from statistics import median
from typing import Any

import torch

import ops
from policy.cache import CachePools
from policy.transformer import Linear, Policy

# The part of each module whose kernels a step calls; what torch computes itself is elementwise.
PARTS = {
    "ops.cpu_matmul": "products",
    "ops.softmax_attention": "attention",
    "ops.linear_attention": "attention",
}
NAMES = ("products", "attention", "elementwise", "head, draw", "prompts")
BANDWIDTH_BYTES = 1 << 28  # read at once; more than any cache holds
PEAK_SHAPE = (2048, 1024, 1024)  # rows, in and out features


def take_apart(policy: Policy, generate: Callable[[], float], batch: int) -> dict[str, Any]:
    """Milliseconds per forward of one run of `generate`, by part; batch: the sequences of a forward."""
    generate()
    with timed(policy) as seconds:
        total = generate()
    steps = seconds.pop("steps")
    parts = {name: 1e3 * seconds[name] / steps for name in NAMES}
    parts["rest"] = 1e3 * total / steps - sum(parts.values())
    bandwidth = read_bandwidth()
    head = policy.lm_head.numel()
    layers = sum(m.weight.numel() for m in policy.modules() if isinstance(m, Linear)) + expert_weights(policy)
    rate = peak(policy.dtype)
    limits = {"products": 2e3 * batch * layers / rate, "head, draw": 2e3 * batch * head / rate}
    memory = {
        "weights": 1e3 * weight_bytes(policy) / bandwidth,
        "attention": 1e3 * batch * bytes_per_sequence(policy) / bandwidth,
    }
    return {"steps": steps, "parts": parts, "limits": limits | {"attention": memory["attention"]}, "memory": memory}


@contextmanager
def timed(policy: Policy) -> Iterator[dict[str, float]]:
    """Seconds by part while it lasts, and "steps": forwards of the policy."""
    seconds: dict[str, float] = defaultdict(float)
    replay, sample, forward = ops.Recording.replay, ops.sample, policy.forward
    calls: dict[ops.Recording, Any] = {}

    def replay_timed(recording: ops.Recording) -> None:
        seconds["steps"] += 1
        if recording not in calls:
            calls[recording] = recording.apart()
        for module, call in calls[recording]:
            start = time.perf_counter()
            call()
            seconds[PARTS.get(module, "elementwise")] += time.perf_counter() - start

    def timing(part: str, function: Callable[..., Any], steps: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += time.perf_counter() - start
                seconds["steps"] += steps

        return run

    ops.Recording.replay, ops.sample = replay_timed, timing("head, draw", sample, 0)  # type: ignore[method-assign]
    policy.forward = timing("prompts", forward, 1)  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        ops.Recording.replay, ops.sample = replay, sample  # type: ignore[method-assign]
        del policy.forward


def expert_weights(policy: Policy) -> int:
    """Numbers in the experts that one token meets."""
    chosen, experts = policy.config.num_experts_per_tok, max(1, policy.config.num_experts)
    return sum(weight.numel() for weight in policy.parameters() if weight.ndim == 3) * chosen // experts


@cache
@torch.no_grad()
def peak(dtype: torch.dtype) -> float:
    """Operations per second of a large product."""
    rows, inner, outer = PEAK_SHAPE
    x, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(outer, inner, dtype=dtype)
    packed = ops.pack_weight(weight, dtype)
    return 2 * rows * inner * outer / _median_seconds(lambda: ops.linear(x, weight, dtype, packed=packed))


def read_bandwidth() -> float:
    """Bytes per second that all threads read together."""
    numbers = torch.ones(BANDWIDTH_BYTES // 4)
    return BANDWIDTH_BYTES / _median_seconds(numbers.sum, repeats=5)


def weight_bytes(policy: Policy) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())


def bytes_per_sequence(policy: Policy) -> int:
    """What a decoded token reads: states and open chunks, and of keys and values the two blocks that 96 tokens fill."""
    config, dtype = policy.config, policy.dtype
    return CachePools.bytes_per_slot(config, dtype) + 2 * CachePools.bytes_per_block(config, dtype)


def _median_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    run(), run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def table(step: dict[str, Any]) -> str:
    parts, limits, total = step["parts"], step["limits"], sum(step["parts"].values())
    lines = [f"  {'part of a step':14} {'ms':>8} {'share':>6} {'limit, ms':>10}"]
    for name, ms in parts.items():
        limit = f"{limits[name]:10.2f}" if name in limits else ""
        lines.append(f"  {name:14} {ms:8.2f} {ms / total:6.0%} {limit}".rstrip())
    least = limits["products"] + limits["head, draw"]
    lines.append(f"  {'all':14} {total:8.2f}   100% {least:10.2f} by products alone, {step['memory']['weights']:.2f} ")
    lines[-1] += "to read the weights once"
    return "\n".join(lines)
