"""`lockstep doctor`: does the alignment contract hold on this machine, and is the rest of it fit for a run?

Row invariance is a property of the CPU's math library, so it is proved here and not assumed: every operator, then a
whole tiny policy in engine and trainer, in both dtypes and at the thread counts a run uses. Takes a few seconds.
"""

import json
from collections.abc import Iterable, Sequence

import torch
from rich.table import Table
from rich.text import Text

from policy.checkpoint import DTYPES
from policy.machine import choose_dtype
from rl.doctor_check import Check
from rl.doctor_machine import available_cores, machine_checks
from rl.doctor_ops import PROBES
from rl.doctor_paths import path_checks
from rl.doctor_policy import find_mismatch, find_unrepeatable
from rl.doctor_probe import find_difference, torch_threads
from rl.doctor_vllm import vllm_checks

ONE_THREAD = "set rollout.threads=1 and trainer.threads=1"
MEASURE = "set loop.on_mismatch=warn, so that a run measures the mismatch instead of stopping, and report this machine"
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def run_checks(threads: int | None) -> list[Check]:
    """threads: CPU threads of the trainer; None is every core. Raises ValueError below 1."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads = {threads}: must be at least 1; leave it out to use every core")
    threads = threads or available_cores()
    with torch_threads(threads):
        chosen, reason = choose_dtype("auto", torch.device("cpu"))
    checks = [*machine_checks(threads), *path_checks(), *vllm_checks(), Check("policy.dtype=auto", True, reason)]
    return [*checks, *operator_checks(PROBES, chosen, threads), *policy_checks(chosen, threads)]


def operator_checks(names: Iterable[str], chosen: torch.dtype, threads: int) -> list[Check]:
    """Row invariance of the named probes in each dtype; one that is not `chosen` only warns."""
    checks = []
    for name in names:
        found = {d: find_difference(PROBES[name], DTYPES[d], _thread_counts(threads)) for d in DTYPES}
        sound_dtype = next((dtype for dtype, difference in found.items() if difference is None), None)
        for dtype, difference in found.items():
            at_threads, detail = difference or (0, f"same bits in every batch {_at(threads)}")
            remedy = _remedy(at_threads, sound_dtype)
            checks.append(Check(f"{name}, {dtype}", difference is None, detail, remedy, DTYPES[dtype] != chosen))
    return checks


def policy_checks(chosen: torch.dtype, threads: int) -> list[Check]:
    """Engine against trainer, and backward against itself, with a tiny policy in each dtype."""
    checks = []
    for name, dtype in DTYPES.items():
        mismatch = find_mismatch(dtype, _thread_counts(threads))
        remedy = "follow the remedy of the operator that fails above, else " + MEASURE
        equal = "engine's log-probs and trainer's: same bits " + _at(threads)
        checks.append(Check(f"engine = trainer, {name}", mismatch is None, mismatch or equal, remedy, dtype != chosen))
        unrepeatable = find_unrepeatable(dtype, threads)
        detail = unrepeatable or f"two passes, {threads} threads: same bits"
        remedy = "set trainer.threads=1; if it stays, two runs of a recipe differ: report this machine"
        checks.append(Check(f"backward repeats, {name}", unrepeatable is None, detail, remedy, dtype != chosen))
    return checks


def exit_code(checks: Sequence[Check]) -> int:
    """1 when a check failed, so that an aligned run would not hold or not start; warnings do not count."""
    return int(any(check.status == "fail" for check in checks))


def doctor_report(checks: Sequence[Check]) -> Table:
    table = Table("", "check", "finding", title="lockstep doctor", title_justify="left")
    for check in checks:
        finding = f"{check.detail}\n-> {check.remedy}" if check.remedy else check.detail
        table.add_row(Text(check.status, STYLES[check.status]), Text(check.name), Text(finding))
    return table


def doctor_json(checks: Sequence[Check]) -> str:
    """{"passed": bool, "checks": [{"name", "status", "detail", "remedy"}]}; remedy is "" where none is needed."""
    rows = [
        {"name": check.name, "status": check.status, "detail": check.detail, "remedy": check.remedy} for check in checks
    ]
    return json.dumps({"passed": exit_code(checks) == 0, "checks": rows}, indent=2)


def _thread_counts(threads: int) -> list[int]:
    """One, every thread of the trainer, and its half: engine workers share the cores."""
    return sorted({1, max(threads // 2, 1), threads})


def _at(threads: int) -> str:
    return f"at {', '.join(map(str, _thread_counts(threads)))} threads"


def _remedy(at_threads: int, sound_dtype: str | None) -> str:
    """What to do about an operator that differs first at `at_threads`; sound_dtype: one in which it never does."""
    ways = [f"set policy.dtype={sound_dtype}"] if sound_dtype else []
    ways += [ONE_THREAD] if at_threads > 1 else []
    return ", or ".join(ways) or MEASURE
