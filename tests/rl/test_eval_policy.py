"""`lockstep eval` and `lockstep compare-eval`: the same JSON every time, also after a kill, and what they refuse."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from policy.checkpoint import load_policy
from rl.eval_policy import stream
from rl.monitor import read_json_lines
from rl.weight_sync import policy_digest
from rollout.engine import Engine
from rollout.request import Completion, Request
from tests.rl.command import lockstep, refusal
from tests.rl.page import Page

ROOT = Path(__file__).parents[2]
PROBLEMS, SAMPLES = 6, 4
OPTIONS = ("--data", "synthetic", "--max-problems", PROBLEMS, "--samples", SAMPLES, "--max-new-tokens", 30)


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="module")
def evaluated(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """result.json of an evaluation that nobody disturbed. To be read only."""
    path = tmp_path_factory.mktemp("evaluated") / "result.json"
    result = lockstep("eval", finished_run, *OPTIONS, "--json", path, "--page", path.with_suffix(".html"))
    assert result.exit_code == 0, result.output
    return path


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_what_is_left_on_disk(evaluated: Path, finished_run: Path) -> None:
    names = {path.name for path in evaluated.parent.iterdir()}
    assert names == {"result.json", "result.completions.jsonl", "result.html"}
    result, problems = read(evaluated), read_json_lines(evaluated.with_name("result.completions.jsonl"))
    assert [row["id"] for row in result["rows"]] == [problem["row"]["id"] for problem in problems]
    assert [problem["index"] for problem in problems] == list(range(PROBLEMS))
    for row, problem in zip(result["rows"], problems, strict=True):
        assert row["samples"] == len(problem["completions"]) == SAMPLES
        assert row["correct"] == sum(each["correct"] for each in problem["completions"])
    assert (result["policy"], result["data"]) == (str(finished_run), "synthetic")
    assert result["weights_digest"] == policy_digest(load_policy(finished_run / "policy"))
    words = Page(evaluated.with_suffix(".html").read_text()).words
    assert all(row["id"] in words for row in result["rows"])


def test_eval_prints_what_it_writes(evaluated: Path, finished_run: Path) -> None:
    result = lockstep("eval", finished_run, *OPTIONS)
    found = read(evaluated)
    for shown in (f"{found['avg@4']:.4f} (95% interval", "cons@4", "6 x 4", "top_p 1.0, at most 30 tokens, seed 0"):
        assert shown in result.stdout
    assert "evaluation: 24 of 24 completions, 6 of 6 problems, " in result.stdout


def test_a_rerun_writes_the_same_bytes(evaluated: Path, finished_run: Path, tmp_path: Path) -> None:
    """Whatever the engine's batches and memory; with them the order changes in which problems finish."""
    again = tmp_path / "again.json"
    engine = ("--max-batch", 3, "--memory-mb", 32)
    assert lockstep("eval", finished_run, *OPTIONS, *engine, "--json", again).exit_code == 0
    assert again.read_bytes() == evaluated.read_bytes()
    completions = evaluated.with_name("result.completions.jsonl")
    assert again.with_name("again.completions.jsonl").read_bytes() == completions.read_bytes()


def asked_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The problems that the engine will be asked from now on."""
    asked: list[int] = []

    def recorded(engine: Engine, requests: Sequence[Request]) -> Iterator[Completion]:
        asked.extend(request.request_id for request in requests)
        yield from stream(engine, requests)

    monkeypatch.setattr("rl.eval_policy.stream", recorded)
    return asked


KILLED = """
import itertools, os, signal, sys
import rl.eval_policy
from rl.cli import app

stream = rl.eval_policy.stream

def cut_short(engine, requests):
    yield from itertools.islice(stream(engine, requests), 14)
    os.kill(os.getpid(), signal.SIGKILL)

rl.eval_policy.stream = cut_short
app()
"""


def test_a_killed_evaluation_goes_on_and_ends_in_the_same_bytes(
    evaluated: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again, journal = tmp_path / "again.json", tmp_path / "again.partial.jsonl"
    # One problem at a time, so that 14 completions are three whole problems and a half.
    arguments = ["eval", finished_run, *OPTIONS, "--max-batch", SAMPLES, "--json", again]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(journal.read_bytes().splitlines()) == 1 + 3 and not again.exists()
    asked = asked_of(monkeypatch)
    result = lockstep(*arguments)
    assert result.exit_code == 0 and "3 of 6 problems were finished before; going on" in result.stdout
    assert asked == [3, 4, 5]
    assert again.read_bytes() == evaluated.read_bytes() and not journal.exists()


def test_an_evaluation_killed_at_the_very_end_asks_nothing_more(
    evaluated: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All problems are in the journal, the result is not written yet."""

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    again = tmp_path / "again.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rl.eval_policy.replace_text", full_disk)
        message = refusal("eval", finished_run, *OPTIONS, "--json", again)
    assert "free some space and with --json, the same command goes on where it stopped" in message
    asked = asked_of(monkeypatch)
    assert lockstep("eval", finished_run, *OPTIONS, "--json", again).exit_code == 0
    assert asked == [] and again.read_bytes() == evaluated.read_bytes()


def test_another_evaluation_is_not_continued(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(engine: Engine, requests: Sequence[Request]) -> Iterator[Completion]:
        yield next(iter(stream(engine, requests)))
        raise KeyboardInterrupt

    monkeypatch.setattr("rl.eval_policy.stream", interrupted)
    result = lockstep("eval", finished_run, *OPTIONS, "--json", tmp_path / "r.json")
    assert (result.exit_code, result.stderr) == (
        130,
        "interrupted; with --json, the same command goes on where it stopped\n",
    )
    message = refusal("eval", finished_run, *OPTIONS, "--json", tmp_path / "r.json", "--temperature", 0.6)
    assert "r.partial.jsonl holds the beginning of another evaluation: temperature 1.0 there, 0.6 now" in message


def test_the_preset_is_the_protocol_of_the_report(finished_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "aime.json"
    options = ("--data", "synthetic", "--max-problems", 1, "--preset", "aime", "--json", path)
    assert lockstep("eval", finished_run, *options).exit_code == 0
    found = read(path)
    assert [found[name] for name in ("samples", "temperature", "top_p")] == [64, 0.6, 1.0]
    assert 200 < found["max_new_tokens"] < 256  # all of the 256 positions but the prompt's
    assert "avg@64" in found and "pass@32" in found and "cons@64" in found


def test_given_values_replace_those_of_the_preset(finished_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "aime.json"
    given = ("--samples", 2, "--temperature", 0.0, "--top-p", 0.9, "--max-new-tokens", 9)
    options = ("--data", "synthetic", "--max-problems", 1, "--preset", "aime", "--json", path)
    assert lockstep("eval", finished_run, *options, *given).exit_code == 0
    found = read(path)
    names = ("samples", "temperature", "top_p", "max_new_tokens")
    assert [found[name] for name in names] == [2, 0.0, 0.9, 9]


def test_problems_from_a_file(finished_run: Path, tmp_path: Path) -> None:
    lockstep("data", "make", "--out", tmp_path / "set.jsonl", "--count", 6)
    options = ("--samples", 2, "--max-new-tokens", 30, "--max-problems", 4, "--json", tmp_path / "result.json")
    result = lockstep("eval", finished_run, "--data", tmp_path / "set.jsonl", *options)
    assert result.exit_code == 0, result.output
    found = read(tmp_path / "result.json")
    assert (found["problems"], found["samples"], found["data"]) == (4, 2, f"{tmp_path}/set.jsonl")


def test_two_policies_are_compared(evaluated: Path, finished_run: Path, tmp_path: Path) -> None:
    greedy = tmp_path / "greedy.json"
    lockstep("eval", finished_run, *OPTIONS, "--temperature", 0, "--json", greedy)
    result = lockstep("compare-eval", evaluated, greedy)
    assert result.exit_code == 0, result.output
    difference = read(greedy)["avg@4"] - read(evaluated)["avg@4"]
    assert f"{difference:+.4f} (95% interval" in result.stdout and "paired sign-flip test" in result.stdout
    assert "1.0 in the first, 0.0 in the second" in result.stdout
    assert "no such file" in refusal("compare-eval", evaluated, tmp_path / "nowhere.json")


def test_an_evaluation_of_the_loop_can_be_compared(finished_run: Path) -> None:
    first, *_, last = sorted((finished_run / "evaluation").iterdir())
    result = lockstep("compare-eval", first, last)
    assert result.exit_code == 0 and "second against first on 8 problems" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--page", "p.html"), "--page p.html shows the completions that --json keeps beside its file; give --json"),
        (("--json", "nowhere/r.json"), "nowhere/r.json: there is no folder nowhere; make it first"),
        (("--top-p", 1.5), "top_p = 1.5: must be above 0 and at most 1"),
        (("--max-new-tokens", 300), "--max-new-tokens 300: the policy has 256 positions and the longest prompt takes "),
        (("--memory-mb", 1), "rollout.memory_mb = 1: 256 sequences need at least"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    finished_run: Path, options: tuple[str | float, ...], message: str
) -> None:
    assert message in refusal("eval", finished_run, "--data", "synthetic", *options)
