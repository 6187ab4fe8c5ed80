"""The pool: order, limits, replaced workers, and nothing started or left behind without need."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from reward.config import RewardConfig
from reward.pool import RewardPool
from reward.result import RewardResult

HALF = ("\\boxed{0.5}", "\\frac{1}{2}")
ENDLESS = ("\\boxed{10^{10^{10}}}", "73")
PATIENT = RewardConfig(timeout_seconds=60.0)


def reasons(results: list[RewardResult]) -> list[str]:
    return [str(result.reason) for result in results]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_integers_import_no_sympy_and_start_no_process() -> None:
    code = (
        "import sys; from reward.config import RewardConfig; from reward.pool import RewardPool;"
        "pool = RewardPool(RewardConfig()); print(pool.score([('\\\\boxed{73}', '073'), ('', '1')]));"
        "assert not {'sympy', 'math_verify'} & sys.modules.keys(); assert not pool._workers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "correct_integer" in done.stdout and "no_answer" in done.stdout


def test_order_is_kept_and_a_stuck_worker_costs_only_its_item() -> None:
    items = [HALF, ENDLESS, ("\\boxed{73}", "73"), ("\\boxed{\\frac13}", "\\frac12"), ENDLESS, HALF, ("", "x")]
    with RewardPool(RewardConfig(workers=2, timeout_seconds=1.0)) as pool:
        results = pool.score(items)
        expected = "correct_symbolic timeout correct_integer wrong_symbolic timeout correct_symbolic no_answer"
        assert reasons(results) == expected.split()
        assert [result.score for result in results] == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
        assert results[1].extracted == "10^{10^{10}}" and results[1].is_failure
        assert 1000.0 <= results[1].milliseconds < 10_000.0
        assert len(pool._workers) <= 2


def test_hostile_text_passes_through_one_worker_and_leaves_it_sound() -> None:
    hostile = [
        "(" * 90 + "1" + ")" * 90,
        "\\begin{pmatrix}" * 20,
        "\\int" * 20,
        "\ud800",
        "7\x003",
        "\u202e37",
        "7\u200b3",
    ]
    with RewardPool(PATIENT) as pool:
        results = pool.score([HALF, *((f"\\boxed{{{text}}}", "73") for text in hostile)])
        process = pool._workers[0].process
        after = pool.score([HALF])
        assert pool._workers[0].process is process
    assert reasons(results) == ["correct_symbolic", *["unparsable_answer"] * 7]
    assert reasons(after) == ["correct_symbolic"]


def test_a_memory_bomb_is_a_failure_and_not_a_wrong_answer() -> None:
    bomb = ("\\boxed{(x+1)^{100000}}", "73")
    with RewardPool(RewardConfig(memory_mb=256, timeout_seconds=60.0)) as pool:
        results = pool.score([bomb, HALF])
    assert results[0].reason in {"verifier_error", "worker_died"} and results[0].is_failure
    assert results[1].reason == "correct_symbolic"


def test_worker_killed_from_outside_loses_one_item_outside_the_main_thread() -> None:
    results: list[RewardResult] = []
    with RewardPool(PATIENT) as pool:
        thread = threading.Thread(target=lambda: results.extend(pool.score([ENDLESS, HALF])))
        thread.start()
        wait_until(lambda: bool(pool._workers) and pool._workers[0].item == 0)
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)
        thread.join(30.0)
    assert reasons(results) == ["worker_died", "correct_symbolic"]


def test_worker_that_died_idle_is_replaced_and_costs_nothing() -> None:
    with RewardPool(PATIENT) as pool:
        assert reasons(pool.score([HALF])) == ["correct_symbolic"]
        first = pool._workers[0].process
        first.kill()
        first.wait()
        assert reasons(pool.score([HALF])) == ["correct_symbolic"]
        assert pool._workers[0].process.pid != first.pid


def test_workers_are_kept_between_calls_and_gone_after_close() -> None:
    with RewardPool(PATIENT) as pool:
        pool.score([HALF])
        process = pool._workers[0].process
        pool.score([HALF])
        assert pool._workers[0].process is process
    assert process.returncode == -signal.SIGKILL


def test_an_interrupted_call_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with RewardPool(PATIENT) as pool:
        pool.score([HALF])
        with monkeypatch.context() as patch:
            patch.setattr("reward.pool.wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pool.score([HALF])
        assert reasons(pool.score([("\\boxed{\\frac13}", "\\frac12")])) == ["wrong_symbolic"]


def test_worker_that_cannot_start_is_an_error_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with RewardPool(PATIENT) as pool, pytest.raises(RuntimeError, match=r"did not start \(exit status 1\)"):
        pool.score([HALF])


def test_workers_die_with_the_parent() -> None:
    code = (
        "from reward.config import RewardConfig; from reward.pool import RewardPool;"
        "pool = RewardPool(RewardConfig(workers=2, timeout_seconds=1.0)); half = ('\\\\boxed{0.5}', '1/2');"
        "pool.score([half, half]); print(*[w.process.pid for w in pool._workers], flush=True);"
        "pool._workers[0].submit(0, '10^{10^{10}}', '73'); input()"
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
