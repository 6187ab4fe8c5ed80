"""Times on a GPU: device events around a call, caches cold, calls in turn, so that a slow minute falls on all alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.record import output

FLUSH_BYTES = 256 * 2**20  # several times the L2 cache
CYCLES_PER_SECOND = 2e9  # of torch's sleeping kernel, about
MAX_WAIT = 0.05  # seconds

Call = Callable[[], object]


class Clock(Protocol):
    """What the suite needs; tests bring their own."""

    def milliseconds(self, calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
        """The time of every call in every round, after one untimed round."""


class CudaClock:
    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def milliseconds(self, calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
        host = {name: _host_seconds(call) for name, call in calls.items()}
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                found[name].append(self._once(call, host[name]))
        return found

    def _once(self, call: Call, host_seconds: float) -> float:
        """The GPU waits until the host has queued the whole call, so gaps between launches are not counted."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(int(min(2 * host_seconds, MAX_WAIT) * CYCLES_PER_SECOND))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


def _host_seconds(call: Call) -> float:
    """How long the host takes to queue it, once everything is compiled."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def measure_peaks(clock: Clock, rounds: int, size: int = 8192) -> dict[str, float]:
    """What this GPU reaches: bytes of a copy per second, read and written; arithmetic of cuBLAS products by dtype."""
    calls: dict[str, Call] = {"copy": _copy(size)}
    calls |= {"bfloat16": _product(size, torch.bfloat16), "float32": _product(size, torch.float32)}
    if torch.cuda.get_device_capability() >= (8, 9):
        calls["float8"] = _fp8_product(size)
    seconds = {name: median(times) / 1e3 for name, times in clock.milliseconds(calls, rounds).items()}
    return {name: (2 * 16.0 * size**2 if name == "copy" else 2.0 * size**3) / each for name, each in seconds.items()}


def _copy(size: int) -> Call:
    x = torch.randn(size, 4 * size, device="cuda")
    y = torch.empty_like(x)
    return lambda: y.copy_(x)


def _product(size: int, dtype: torch.dtype) -> Call:
    a, b = _operands(size, dtype)
    return lambda: a @ b


def _fp8_product(size: int) -> Call:
    a, b = (x.to(torch.float8_e4m3fn) for x in _operands(size, torch.bfloat16))
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _operands(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return a, b


def describe_gpu() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    asked = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
    told = output("nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader").splitlines()
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        ", ".join(asked): told[0] if told else "unknown",
        "cuda": str(torch.version.cuda),
    }
