"""A user's function under the pool's limits: its value, or what went wrong and where."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reward.config import RewardConfig
from reward.pool import RewardPool
from reward.result import CallResult

FUNCTIONS = """\
import math, os, subprocess, sys, time
import beside

LOADED = os.getpid()

def length(completion, **kwargs):
    print("a user's prints go nowhere")
    return len(completion)

def anything(value):
    return eval(value)

def slow(seconds):
    time.sleep(seconds)
    return 1

def speak(text, then=0.0):
    # What the worker says to its parent, in the worker's place.
    for fd in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{fd}") or os.path.islink(f"/proc/self/fd/{fd}"):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                os.write(int(fd), text.encode())
                break
    time.sleep(then)
    return 1.0

def child(path):
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(1); open({path!r}, 'w')"])
    time.sleep(60)

def raises(depth):
    if depth == 0:
        raise KeyError("missing\\nsecond line")
    raises(depth - 1)

def number_from_beside(**kwargs):
    return beside.NUMBER

def pid():
    return os.getpid()
"""
OK = ("ok", "")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "my_rewards.py").write_text(FUNCTIONS)
    (folder / "beside.py").write_text("NUMBER = 0.25\n")
    return folder / "my_rewards.py"


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(RewardConfig(timeout_seconds=30.0)) as pool:
        yield pool


def call(function: str, *items: dict[str, Any], **config: Any) -> list[CallResult]:
    """In a pool of its own."""
    with RewardPool(RewardConfig(**{"timeout_seconds": 30.0, **config})) as pool:
        return pool.call(function, items)


def said(result: CallResult) -> tuple[float | None, str, str]:
    return result.value, str(result.reason), result.message


def test_values_come_back_in_order_from_every_worker(file: Path) -> None:
    items = [{"completion": "x" * length, "answer": "unused"} for length in range(20)]
    results = call(f"{file}:length", *items, workers=2)
    assert [said(result) for result in results] == [(float(length), *OK) for length in range(20)]
    assert not any(result.is_failure for result in results)
    assert all(result.milliseconds > 0 for result in results)


def test_a_function_can_import_what_lies_beside_its_file(file: Path) -> None:
    assert said(call(f"{file}:number_from_beside", {})[0]) == (0.25, *OK)


def test_a_module_serves_as_well_as_a_file() -> None:
    assert said(call("math:hypot", {}, {})[0])[0] == 0.0


def test_text_of_any_kind_arrives_whole(pool: RewardPool, file: Path) -> None:
    text = "\u2028\n\x00\ud800\u202e" + "x" * 3_000_000
    assert said(pool.call(f"{file}:length", [{"completion": text}])[0]) == (float(len(text)), *OK)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("'x'", "returned str 'x'; it must return a number"),
        ("None", "returned NoneType None; it must return a number"),
        ("math.nan", "returned nan; it must return a finite number"),
        ("-math.inf", "returned -inf; it must return a finite number"),
        ("10**400", "OverflowError: int too large to convert to float"),
        ("1j", "returned complex 1j; it must return a number"),
        ("1/0", "ZeroDivisionError: division by zero (my_rewards.py, line 11)"),
    ],
)
def test_no_finite_number_is_a_user_error(pool: RewardPool, file: Path, value: str, message: str) -> None:
    (result,) = pool.call(f"{file}:anything", [{"value": value}])
    assert (result.value, result.reason, result.is_failure) == (None, "user_error", True)
    assert result.message.startswith(message)


@pytest.mark.parametrize(("value", "number"), [("True", 1.0), ("3", 3.0), ("-0.5", -0.5)])
def test_numbers_of_other_types_are_values(pool: RewardPool, file: Path, value: str, number: float) -> None:
    assert said(pool.call(f"{file}:anything", [{"value": value}])[0]) == (number, *OK)


def test_an_error_names_its_first_line_and_the_line_of_the_users_file(file: Path) -> None:
    (result,) = call(f"{file}:raises", {"depth": 2})
    assert said(result) == (None, "user_error", "KeyError: 'missing\\nsecond line' (my_rewards.py, line 33)")


def test_a_wrong_signature_is_a_user_error(pool: RewardPool, file: Path) -> None:
    (result,) = pool.call(f"{file}:slow", [{"minutes": 1}])
    assert said(result) == (None, "user_error", "TypeError: slow() got an unexpected keyword argument 'minutes'")


def test_one_that_hangs_dies_or_eats_all_memory_costs_its_item_only(file: Path) -> None:
    values = ["1", "time.sleep(60)", "2", "os._exit(3)", "3", "sys.exit(4)", "4", "len(bytearray(10**10))", "5"]
    results = call(f"{file}:anything", *({"value": value} for value in values), timeout_seconds=1.0)
    assert [said(result) for result in results] == [
        (1.0, *OK),
        (None, "timeout", "no answer within 1 s"),
        (2.0, *OK),
        (None, "worker_died", "the worker died with exit status 3"),
        (3.0, *OK),
        (None, "worker_died", "the worker died with exit status 4"),
        (4.0, *OK),
        (None, "out_of_memory", "more than 1024 MiB"),
        (5.0, *OK),
    ]


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        ("garbage\n", "worker_died", "the worker sent b'garbage\\n'"),
        ("x" * 100_000, "worker_died", "the worker sent b'xxx"),
        ("[]\n", "worker_died", "the worker sent b'[]\\n'"),
        ('{"reason": "fine"}\n', "worker_died", "the worker sent b'{"),
        ('{"reason": "ok", "value": "1"}\n', "worker_died", "the worker sent b'{"),
        ('{"reason": "ok", "value": 1.0, "more": 1}\n', "worker_died", "the worker sent b'{"),
        ("[" * 50_000 + "\n", "worker_died", "the worker sent b'[[["),
        ('{"reason": ', "timeout", "no answer within 1 s"),
    ],
)
def test_garbage_on_the_pipe_costs_its_item_only(file: Path, text: str, reason: str, message: str) -> None:
    garbage, well = {"text": text, "then": 30.0}, {"text": ""}
    first, second = call(f"{file}:speak", garbage, well, timeout_seconds=1.0)
    assert (first.value, first.reason) == (None, reason)
    assert first.message.startswith(message)
    assert said(second) == (1.0, *OK)


def test_a_stopped_worker_that_reads_nothing_cannot_hold_up_its_parent(file: Path) -> None:
    with RewardPool(RewardConfig(timeout_seconds=1.0)) as pool:
        pool.call(f"{file}:length", [{"completion": ""}])
        worker = pool._teams[f"call:{file}:length"][0].process.pid
        os.kill(worker, signal.SIGSTOP)
        start = time.monotonic()
        stuck, well = pool.call(f"{file}:length", [{"completion": "x" * 10_000_000}, {"completion": "x"}])
        assert time.monotonic() - start < 20.0
    assert said(stuck) == (None, "timeout", "no answer within 1 s")
    assert said(well) == (1.0, *OK)


def test_what_a_killed_function_had_started_is_killed_too(file: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    (result,) = call(f"{file}:child", {"path": str(touched)}, timeout_seconds=0.3)
    time.sleep(1.5)
    assert result.reason == "timeout" and not touched.exists()


def test_a_function_has_a_worker_of_its_own_that_loads_it_once(pool: RewardPool, file: Path) -> None:
    first = [pool.call(f"{file}:pid", [{}])[0].value for _ in range(3)]
    assert len(set(first)) == 1 and first[0] != pool.call("os:getpid", [{}])[0].value


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (None, "score", "cannot load {file}: FileNotFoundError: no such file in "),
        ("x = 1", "score", "{file} has no function 'score'; it has none"),
        ("def reward(): pass", "score", "{file} has no function 'score'; it has reward"),
        ("score = 1", "score", "{file} has no function 'score'; it has none"),
        ("import torch_of_tomorrow", "score", "cannot load {file}: ModuleNotFoundError: No module named 'torch_of"),
        ("\n1/0", "score", "cannot load {file}: ZeroDivisionError: division by zero (code.py, line 2)"),
        ("def score(:", "score", "cannot load {file}: SyntaxError: invalid syntax ({file}, line 1)"),
        ("", "not a name", "a function is named FILE.py:NAME or MODULE:NAME, got '{file}:not a name'"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused(tmp_path: Path, code: str | None, name: str, message: str) -> None:
    file = tmp_path / "code.py"
    if code is not None:
        file.write_text(code)
    with pytest.raises(ValueError) as refusal:
        call(f"{file}:{name}", {})
    assert str(refusal.value).startswith(message.replace("{file}", str(file)))
