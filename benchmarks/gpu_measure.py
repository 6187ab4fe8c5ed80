"""One production shape on a GPU: checked, then timed beside what a user would call instead, then reckoned up."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from triton.errors import TritonError

import ops
from benchmarks.gpu_checks import Outcome, make_inputs, repeats_differ, rows_differ
from benchmarks.gpu_clock import Call, Clock
from benchmarks.gpu_targets import reached
from benchmarks.operators.case import Case

OURS, FAST = "lockstep", "unaligned form"
FAST_NAMES = {"linear_attention": "lightning_attention"}  # of operators whose tests are named otherwise
# What a library may raise that is not made for this machine, version or shape. Ours may fail too: the others go on.
FAILURES = (ImportError, AttributeError, AssertionError, RuntimeError, TypeError, ValueError, TritonError)


@dataclass(frozen=True)
class Effort:
    repeats: int = 100  # runs that must have equal bits
    rounds: int = 30  # timed calls


QUICK = Effort(repeats=3, rounds=3)


@dataclass(frozen=True)
class Bench:
    """Where cases run and what times them."""

    device: torch.device
    clock: Clock
    peaks: Mapping[str, float]
    effort: Effort


def measure(case: Case, tests: Outcome, bench: Bench) -> dict[str, Any]:
    """The record of a case: its times, or why it was refused."""
    record = {"operator": case.operator, "name": case.name, "shape": case.shape}
    if refused := tests.problem or _check(case, bench):
        return {**record, "refused": refused}
    return {**record, **_time(case, bench)}


def _check(case: Case, bench: Bench) -> str | None:
    try:
        return repeats_differ(case, bench.device, bench.effort.repeats) or rows_differ(case, bench.device)
    except FAILURES as error:
        return say(error)


def _time(case: Case, bench: Bench) -> dict[str, Any]:
    arguments = make_inputs(case, bench.device)
    calls, missing = callable_on(case, arguments)
    times = bench.clock.milliseconds(calls, bench.effort.rounds)
    ours, *others = (median(times[name]) for name in calls)
    peers = dict(zip(list(calls)[1:], others, strict=True))
    first = next(iter(case.peers), None)
    return {
        "milliseconds": {"median": ours, "quartiles": _quartiles(times[OURS])},
        "bytes_per_second": case.bytes / ours * 1e3,
        "flops_per_second": case.flops / ours * 1e3,
        "roofline": roofline(case, ours, bench.peaks),
        "peers": {
            name: {"milliseconds": each, "quartiles": _quartiles(times[name]), "ratio": each / ours}
            for name, each in peers.items()
        },
        "missing": missing,
        "targets": reached(case, ours, peers.get(first) if first else None, bench.peaks),
    }


def callable_on(case: Case, arguments: Sequence[object]) -> tuple[dict[str, Call], dict[str, str]]:
    """What is timed, ours first, each having run once; and what cannot be, with the reason."""
    calls: dict[str, Call] = {OURS: partial(case.run, *arguments)}
    missing: dict[str, str] = {}
    others: dict[str, Callable[[], Callable[..., object]]] = dict(case.peers)
    if (fast := FAST_NAMES.get(case.operator, case.operator)) in ops.FAST_FORMS:
        others[FAST] = lambda: unaligned(fast, case.run)
    for name, make in others.items():
        try:
            run = make()
            run(*arguments)
        except FAILURES as error:
            missing[name] = say(error)
        else:
            calls[name] = partial(run, *arguments)
    return calls, missing


def unaligned(operator: str, run: Callable[..., object]) -> Callable[..., object]:
    """`run` with the operator in its fast form."""

    def fast(*arguments: object) -> object:
        ops.use_fast([operator])
        try:
            return run(*arguments)
        finally:
            ops.use_fast([])

    return fast


def roofline(case: Case, milliseconds: float, peaks: Mapping[str, float]) -> dict[str, Any] | None:
    """The time that bandwidth or arithmetic allows, whichever is longer, over the time taken."""
    bounds = {"memory": case.bytes / peaks["copy"], "arithmetic": case.flops / peaks.get(case.dtype, float("inf"))}
    bound = max(bounds, key=lambda name: bounds[name])
    return {"bound": bound, "share": bounds[bound] * 1e3 / milliseconds} if bounds[bound] else None


def _quartiles(times: Sequence[float]) -> list[float]:
    ordered = sorted(times)
    return [ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]]


def say(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
