"""The pool: order, limits, replaced workers, and nothing started or left behind without need."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from reward.config import RewardConfig
from reward.pool import RewardPool
from reward.process import Worker
from reward.result import RewardResult

HALF = ("\\boxed{\\sqrt{2}/2}", "\\frac{1}{\\sqrt{2}}")
WRONG = ("\\boxed{\\sqrt{3}/2}", "\\frac{1}{\\sqrt{2}}")
ENDLESS = ("\\boxed{10^{10^{10}}}", "\\sqrt{2}")
PATIENT = RewardConfig(timeout_seconds=60.0)


def reasons(results: list[RewardResult]) -> list[str]:
    return [str(result.reason) for result in results]


def workers(pool: RewardPool) -> list[Worker]:
    return [worker for team in pool._teams.values() for worker in team]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def strike(pool: RewardPool, sign: signal.Signals, run: Callable[[], list[Any]]) -> list[Any]:
    """Run from another thread, and send the signal to the worker that holds the first item."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(run()))
    thread.start()
    wait_until(lambda: bool(workers(pool)) and workers(pool)[0].item == 0)
    os.kill(workers(pool)[0].process.pid, sign)
    thread.join(60.0)
    return results


@pytest.fixture(scope="module")
def patient() -> Iterator[RewardPool]:
    with RewardPool(PATIENT) as pool:
        yield pool


def test_what_needs_no_sympy_imports_none_and_starts_no_process() -> None:
    code = (
        "import sys; from reward.config import RewardConfig; from reward.pool import RewardPool;"
        "pool = RewardPool(RewardConfig());"
        "print(pool.score([('\\\\boxed{73}', '073'), ('', '1'), ('\\\\boxed{5!}', '120'), ('\\\\boxed{B}', 'C')]));"
        "assert not {'sympy', 'math_verify'} & sys.modules.keys(); assert not pool._teams.get('verify')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for reason in ("'correct'", "'no_answer'", "'wrong_form'", "'wrong'"):
        assert reason in done.stdout


def test_order_is_kept_and_a_stuck_worker_costs_only_its_item() -> None:
    with RewardPool(RewardConfig(timeout_seconds=1.0)) as pool:
        results = pool.score([HALF, ENDLESS, ("\\boxed{73}", "73"), WRONG, ("", "x")])
    assert reasons(results) == ["correct", "timeout", "correct", "wrong", "no_answer"]
    assert [result.score for result in results] == [1.0, 0.0, 1.0, 0.0, 0.0]
    stuck = results[1]
    assert stuck.is_failure and stuck.message == "no answer within 1 s"
    assert (stuck.extracted, stuck.gold, stuck.method) == ("10^{10^{10}}", "\\sqrt{2}", "symbolic")
    assert 1000.0 <= stuck.milliseconds < 10_000.0


def test_no_more_is_in_flight_than_there_are_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    in_flight = []
    submit = Worker.submit

    def counting(self: Worker, item: int, request: bytes) -> None:
        submit(self, item, request)
        in_flight.append(sum(worker.item is not None for worker in workers(pool)))

    monkeypatch.setattr(Worker, "submit", counting)
    with RewardPool(RewardConfig(workers=2, timeout_seconds=60.0)) as pool:
        results = pool.call("operator:length_hint", [{}] * 40)
    assert len(results) == len(in_flight) == 40 and max(in_flight) <= 2


def test_hostile_text_passes_through_one_worker_and_leaves_it_sound(patient: RewardPool) -> None:
    hostile = ["\\begin{pmatrix}" * 20, "\\int\\int x", "|" * 50, "\\frac{}{}", "\\text{", "'" * 100, "x_" * 50]
    first = patient.score([HALF])
    process = workers(patient)[0].process
    results = patient.score([(f"\\boxed{{{text}}}", "\\int x") for text in hostile])
    after = patient.score([HALF])
    assert workers(patient)[0].process is process
    assert not any(result.is_failure for result in results)
    assert [result.score for result in [*first, *results, *after]] == [1.0, *[0.0] * 7, 1.0]


@pytest.mark.slow
def test_a_memory_bomb_is_a_failure_and_not_a_wrong_answer() -> None:
    bomb = ("\\boxed{(x+1)^{100000}}", "x^2+1")
    with RewardPool(RewardConfig(memory_mb=256, timeout_seconds=120.0)) as pool:
        results = pool.score([bomb, HALF])
    assert reasons(results) == ["out_of_memory", "correct"] and results[0].is_failure


def test_a_verifier_killed_in_mid_item_loses_that_item_only() -> None:
    with RewardPool(PATIENT) as pool:
        results = strike(pool, signal.SIGKILL, lambda: pool.score([ENDLESS, HALF, WRONG]))
    assert reasons(results) == ["worker_died", "correct", "wrong"]
    assert results[0].message == "the worker died with exit status -9"


@pytest.mark.parametrize(
    ("sign", "reason", "message"),
    [
        (signal.SIGTERM, "worker_died", "the worker died with exit status -15"),
        (signal.SIGSEGV, "worker_died", "the worker died with exit status -11"),
        (signal.SIGSTOP, "timeout", "no answer within 1 s"),
    ],
)
def test_a_worker_struck_in_mid_item_loses_that_item_only(sign: signal.Signals, reason: str, message: str) -> None:
    with RewardPool(RewardConfig(timeout_seconds=1.0)) as pool:
        results = strike(pool, sign, lambda: pool.call("signal:sigwait", [{"sigset": [10]}, {}, {}]))
    assert (str(results[0].reason), results[0].message) == (reason, message)
    assert [str(result.reason) for result in results[1:]] == ["user_error"] * 2


def test_a_worker_that_died_idle_is_replaced_and_costs_nothing() -> None:
    with RewardPool(PATIENT) as pool:
        pids = []
        for _ in range(2):
            (result,) = pool.call("os:getpid", [{}])
            pids.append(result.value)
            workers(pool)[0].process.kill()
            workers(pool)[0].process.wait()
    assert None not in pids and pids[0] != pids[1]


def test_workers_are_kept_between_calls_and_gone_after_close() -> None:
    with RewardPool(PATIENT) as pool:
        pool.call("os:getpid", [{}])
        process = workers(pool)[0].process
        pool.call("os:getpid", [{}])
        assert workers(pool)[0].process is process
    assert process.returncode == -signal.SIGKILL


def test_an_interrupted_call_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with RewardPool(PATIENT) as pool:
        with monkeypatch.context() as patch:
            patch.setattr("reward.pool._wait", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pool.call("os:getpid", [{}])
        assert workers(pool) == []
        assert pool.call("os:getpid", [{}])[0].reason == "ok"


def test_worker_that_cannot_start_is_an_error_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with RewardPool(PATIENT) as pool, pytest.raises(RuntimeError, match=r"did not start \(.* exit status 1\)"):
        pool.score([HALF])


def test_a_verdict_does_not_depend_on_what_the_worker_saw_before(patient: RewardPool) -> None:
    items = [HALF, WRONG, ("\\boxed{\\sin 2x}", "2\\sin x\\cos x"), ("\\boxed{x^2}", "x^2+1")]
    alone = [patient.score([item])[0].reason for item in items]
    assert [result.reason for result in patient.score([*items[::-1], *items])] == [*alone[::-1], *alone]


def test_workers_die_with_the_parent() -> None:
    code = (
        "from reward.config import RewardConfig; from reward.pool import RewardPool;"
        "pool = RewardPool(RewardConfig(timeout_seconds=1.0)); pool.score([('\\\\boxed{\\\\sqrt{2}}', 'x')]);"
        "team = pool._teams['verify']; print(team[0].process.pid, flush=True);"
        'team[0].submit(0, b\'{"extracted": "10^{10^{10}}", "gold": "x"}\'); input()'
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids
        time.sleep(0.2)
        parent.kill()
    wait_until(lambda: not any(runs(pid) for pid in pids))


def runs(pid: int) -> bool:
    """False for a zombie too: in a container nobody may reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    "wrong", [{"workers": 0}, {"timeout_seconds": 0}, {"memory_mb": 64}, {"answer_marker": ""}, {"worker": 1}]
)
def test_config_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RewardConfig.model_validate(wrong)
