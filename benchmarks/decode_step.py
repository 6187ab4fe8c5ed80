"""Where a step of the local engine goes, beside what the machine needs for its arithmetic and memory traffic alone.

    products    matrix products of the layers. Limit: the same by torch alone, in the type that the CPU multiplies
    attention   softmax and lightning. Limit: bytes of keys, values and states it reads / bandwidth
    elementwise norms, rotation, SwiGLU, router. No limit worth stating: the operands lie in the cache
    head, draw  LM head in FP32, log-probs, draw. Limit: the FP32 product by torch alone
    rest        the network's and the engine's own Python

Limits are measured where they are used: operators are small, and no peak of a large product speaks for them.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

import ops
from policy.cache import CachePools
from policy.transformer import Linear, Policy

PARTS = {
    "products": ("linear", "fp32_linear", "experts"),
    "attention": ("softmax_attention", "lightning_attention"),
    "elementwise": ("rms_norm", "add_rms_norm", "grouped_rms_norm_gate", "qk_norm_rope", "swiglu", "route"),
    "head, draw": ("sample",),
}
BANDWIDTH_BYTES = 1 << 28  # read at once; more than any cache holds


def take_apart(policy: Policy, generate: Callable[[], float], batch: int) -> dict[str, Any]:
    """Milliseconds per forward of one run of `generate`, by part; batch: the sequences of a forward."""
    generate()
    with timed(policy) as seconds:
        total = generate()
    steps = seconds.pop("steps")
    parts = {name: 1e3 * seconds[name] / steps for name in PARTS}
    parts["rest"] = 1e3 * total / steps - sum(parts.values())
    bandwidth = read_bandwidth()
    limits = {"products": 1e3 * layer_products(policy, batch), "head, draw": 1e3 * head_product(policy, batch)}
    memory = {
        "weights": 1e3 * weight_bytes(policy) / bandwidth,
        "attention": 1e3 * batch * bytes_per_sequence(policy) / bandwidth,
    }
    return {"steps": steps, "parts": parts, "limits": limits | {"attention": memory["attention"]}, "memory": memory}


@contextmanager
def timed(policy: Policy) -> Iterator[dict[str, float]]:
    """Seconds by part while it lasts, and "steps": forwards of the policy."""
    seconds: dict[str, float] = defaultdict(float)
    depth = 0

    def watch(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            start, depth = time.perf_counter(), depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                if not depth:
                    seconds[part] += time.perf_counter() - start

        return watched

    def count(*_: Any) -> None:
        seconds["steps"] += 1

    hook = policy.register_forward_hook(count)
    originals = {name: getattr(ops, name) for names in PARTS.values() for name in names}
    for part, names in PARTS.items():
        for name in names:
            setattr(ops, name, watch(originals[name], part))
    try:
        yield seconds
    finally:
        hook.remove()
        for name, function in originals.items():
            setattr(ops, name, function)


def layer_products(policy: Policy, rows: int) -> float:
    """Seconds of all products of the layers with `rows` rows, by torch alone; of experts those that a token meets, as
    one dense product each."""
    shapes = Counter((m.weight.shape[0], m.weight.shape[1]) for m in policy.modules() if isinstance(m, Linear))
    chosen = policy.config.num_experts_per_tok
    for name, weight in policy.named_parameters():
        if weight.ndim == 3:
            assert name.endswith(("gate_up", "down"))
            shapes[weight.shape[1], weight.shape[2]] += chosen
    return sum(count * product_seconds(rows, n, k, policy.dtype) for (n, k), count in shapes.items())


def head_product(policy: Policy, rows: int) -> float:
    return product_seconds(rows, len(policy.lm_head), policy.config.hidden_size, torch.float32)


@torch.no_grad()
def product_seconds(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> float:
    x, weight = torch.randn(rows, in_features, dtype=dtype), torch.randn(out_features, in_features, dtype=dtype)
    return _median_seconds(lambda: F.linear(x, weight))


def read_bandwidth() -> float:
    """Bytes per second that all threads read together."""
    numbers = torch.ones(BANDWIDTH_BYTES // 4)
    return BANDWIDTH_BYTES / _median_seconds(numbers.sum, repeats=5)


def weight_bytes(policy: Policy) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())


def bytes_per_sequence(policy: Policy) -> int:
    """What a decoded token reads: states and open chunks, and of keys and values the two blocks that 96 tokens fill."""
    return CachePools.bytes_per_slot(policy.config, policy.dtype) + 2 * CachePools.bytes_per_block(
        policy.config, policy.dtype
    )


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
