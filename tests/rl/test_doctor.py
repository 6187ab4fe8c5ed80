"""The doctor passes a sound machine, and names what is wrong with an unsound one."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet
from rich.console import Console
from torch import Tensor

import ops
from rl import doctor_machine
from rl.doctor import (
    MEASURE,
    ONE_THREAD,
    PROBES,
    doctor_json,
    doctor_report,
    exit_code,
    operator_checks,
    policy_checks,
    run_checks,
)
from rl.doctor_check import Check

OPERATORS = [(name, name) for name in PROBES if name != "route and experts"]
OPERATORS += [("route and experts", "route"), ("route and experts", "experts")]
CHECKS = [
    Check("linear", True, "same bits", "unused"),
    Check("disk [run]", False, "0.5 GiB", "free it", soft=True),
    Check("rope", False, "other bits", "set policy.dtype=float32"),
]


def nudge(value: Any) -> Any:
    """Moves the last bit of one number."""
    if isinstance(value, tuple):
        return tuple(nudge(part) for part in value)
    if not value.is_floating_point():
        return value
    y: Tensor = value.clone()
    first = y.flatten()[0]
    y.view(-1)[0] = torch.nextafter(first, torch.full_like(first, 1e9))
    return y


def break_operator(monkeypatch, name: str, when: Callable[..., bool]) -> None:
    """Replaces an operator by one whose output moves in its last bit when `when` says so of the arguments."""
    sound = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args: nudge(sound(*args)) if when(*args) else sound(*args))


def few_rows(x: Tensor, *_: Any) -> bool:
    return len(x) < 8


@pytest.fixture
def set_threads(monkeypatch) -> list[int]:
    """Thread counts that are asked for; torch stays at one, so that a busy machine does not slow the tests."""
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    return counts


def test_this_machine_is_sound() -> None:
    checks = run_checks(1)
    assert exit_code(checks) == 0, [check for check in checks if check.status == "fail"]
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {f"{name}, {dtype}" for name in PROBES for dtype in ("bfloat16", "float32")} < set(names)
    assert {"python", "torch", "ray", "transformers", "math-verify", "engine = trainer, float32"} < set(names)


def test_every_thread_count_gives_the_same_bits() -> None:
    (check,) = [c for c in operator_checks(["linear"], torch.float32, 2) if c.name == "linear, float32"]
    assert (check.status, check.detail) == ("ok", "same bits in every batch at 1, 2 threads")
    assert torch.get_num_threads() == 1


def test_threads_must_be_positive() -> None:
    with pytest.raises(ValueError, match="threads = 0: must be at least 1"):
        run_checks(0)


@pytest.mark.parametrize(("probe", "operator"), OPERATORS)
def test_one_bit_of_one_number_is_found(monkeypatch, probe: str, operator: str) -> None:
    rows = 300 if "attention" in probe else 8  # 300 tokens: less than 40 sequences have
    break_operator(monkeypatch, operator, lambda x, *_: len(x) < rows)
    checks = operator_checks([probe], torch.float32, 1)
    assert {check.name: check.status for check in checks} == {f"{probe}, bfloat16": "warn", f"{probe}, float32": "fail"}
    assert all("a batch of 1 (rows 0 to 0 of " in check.detail for check in checks)
    assert {check.remedy for check in checks} == {MEASURE}


def test_a_sum_split_by_batch_size_is_found_and_nothing_else(monkeypatch) -> None:
    def split_sum(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x, weight, half = x.to(dtype), weight.to(dtype), x.shape[-1] // (2 if len(x) < 16 else 1)
        return x[..., :half] @ weight[:, :half].t() + x[..., half:] @ weight[:, half:].t()

    monkeypatch.setattr(ops, "linear", split_sum)
    checks = operator_checks(PROBES, torch.bfloat16, 1)
    assert [c.name for c in checks if not c.passed] == ["linear, bfloat16", "linear, float32"]


@pytest.mark.parametrize("operator", ["lightning_attention", "softmax_attention"])
def test_a_decode_that_differs_from_training_is_found(monkeypatch, operator: str) -> None:
    layout = 4 if operator == "lightning_attention" else 3
    break_operator(monkeypatch, operator, lambda *args: args[layout].is_decode)
    checks = operator_checks([operator], torch.float32, 1)
    assert all(check.detail.startswith("chunked prefill and decode, a batch of 40") for check in checks)


def test_a_dtype_that_is_not_chosen_only_warns(monkeypatch) -> None:
    break_operator(monkeypatch, "linear", lambda x, _, dtype: few_rows(x) and dtype == torch.float32)
    unused = operator_checks(["linear"], torch.bfloat16, 1)
    assert ([check.status for check in unused], exit_code(unused)) == (["ok", "warn"], 0)
    used = operator_checks(["linear"], torch.float32, 1)
    assert ([check.status for check in used], exit_code(used)) == (["ok", "fail"], 1)
    assert used[1].remedy == "set policy.dtype=bfloat16"


def test_bits_that_depend_on_the_thread_count_are_found(monkeypatch, set_threads) -> None:
    break_operator(monkeypatch, "rms_norm", lambda *_: set_threads[-1] == 2)
    checks = operator_checks(["rms_norm"], torch.float32, 2)
    assert all(check.detail.endswith("; 2 threads") and check.remedy == ONE_THREAD for check in checks)


def test_a_mismatch_of_engine_and_trainer_is_found(monkeypatch) -> None:
    sound = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda x, *args: sound(x, *args) * (1.01 if len(x) < 11 else 1.0))
    mismatches = [check for check in policy_checks(torch.float32, 1) if check.name.startswith("engine = trainer")]
    assert [check.status for check in mismatches] == ["warn", "fail"]
    said = re.compile(r"[1-9]\d* of \d+ log-probs differ: engine 1 threads, trainer 1")
    assert all(said.fullmatch(check.detail) for check in mismatches)


def test_an_engine_that_depends_on_its_threads_is_found(monkeypatch, set_threads) -> None:
    sound = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda x, *args: sound(x, *args) * (1.01 if set_threads[-1] == 2 else 1.0))
    check = policy_checks(torch.bfloat16, 2)[0]
    expected = "the engine samples other tokens or log-probs at 2 threads than at 1"
    assert (check.status, check.detail) == ("fail", expected)


def test_a_backward_pass_that_does_not_repeat_is_found(monkeypatch) -> None:
    sound = ops.swiglu
    monkeypatch.setattr(ops, "swiglu", lambda x: sound(x) * (1 + 0.1 * torch.rand(())))
    repeats = [check for check in policy_checks(torch.float32, 1) if check.name.startswith("backward repeats")]
    assert [check.status for check in repeats] == ["warn", "fail"]
    assert all("gradients differ, the first word_embeddings" in check.detail for check in repeats)


@pytest.mark.parametrize(("version", "status"), [("2.13.0+cpu", "ok"), ("2.10.1", "warn"), ("2.14.0", "warn")])
def test_versions_outside_the_range_warn(version: str, status: str) -> None:
    check = doctor_machine._version_check("torch", version, SpecifierSet(">=2.11,<=2.13.0"))
    assert (check.status, check.detail) == (status, f"{version} (supported: <=2.13.0,>=2.11)")


def test_a_missing_library_fails() -> None:
    check = doctor_machine._library_check("ray", "no_such_module", SpecifierSet(">=2.60"))
    assert (check.status, check.remedy) == ("fail", "run `pip install 'ray>=2.60'`")
    assert "No module named 'no_such_module'" in check.detail


def test_more_threads_than_cores_warn(monkeypatch) -> None:
    monkeypatch.setattr(doctor_machine, "available_cores", lambda: 2)
    assert [doctor_machine._threads_check(threads).status for threads in (2, 3)] == ["ok", "warn"]


@pytest.mark.parametrize(("free", "status"), [(2**31, "ok"), (2**31 - 1, "warn")])
def test_little_room_warns(free: int, status: str) -> None:
    check = doctor_machine._room_check("disk", free, 2**31, "in /runs", "free it")
    assert (check.status, check.detail) == (status, "2.0 GiB in /runs, at least 2 advised")


def test_report_shows_status_finding_and_remedy() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(doctor_report(CHECKS))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if "│" in line]
    assert rows == [
        ["ok", "linear", "same bits"],
        ["warn", "disk [run]", "0.5 GiB"],
        ["", "", "-> free it"],
        ["fail", "rope", "other bits"],
        ["", "", "-> set policy.dtype=float32"],
    ]


def test_json_and_exit_code() -> None:
    assert json.loads(doctor_json(CHECKS)) == {
        "passed": False,
        "checks": [
            {"name": "linear", "status": "ok", "detail": "same bits", "remedy": ""},
            {"name": "disk [run]", "status": "warn", "detail": "0.5 GiB", "remedy": "free it"},
            {"name": "rope", "status": "fail", "detail": "other bits", "remedy": "set policy.dtype=float32"},
        ],
    }
    assert (exit_code(CHECKS), exit_code(CHECKS[:2])) == (1, 0)
