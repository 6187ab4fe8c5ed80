"""`lockstep train` as a user runs it, with Ray: complete, the same bits every time, whenever it was killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from policy.checkpoint import load_policy
from policy.digest import tensor_digest, weights_digest
from policy.tokenizer import load_tokenizer
from rl.config import load_recipe
from rl.monitor import read_json_lines, read_metrics
from rl.train import resolve
from rl.weight_sync import policy_digest
from tests.rl.tiny import GROUP, PROMPTS, STEPS, tiny_recipe, write_recipe
from trainer.state import latest_checkpoint, load_checkpoint
from trainer.trainer import Trainer

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 300.0
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


class Command:
    """`lockstep train` of the tiny recipe in a process of its own, with a cache of base policies of its own."""

    def __init__(self, folder: Path) -> None:
        self.run, self.cache, self.output = folder / "run", folder / "cache", folder / "output.txt"
        self.recipe = write_recipe(folder)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "from rl.cli import app; app()", "train", self.recipe, *arguments]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "RAY_"))
        }
        # Into a file: what outlives a killed driver would keep a pipe open.
        with self.output.open("w") as output:
            return subprocess.Popen(
                [*map(str, command), "--run-dir", str(self.run)],
                env={**environment, "XDG_CACHE_HOME": str(self.cache), "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def complete(self, *arguments: str) -> dict[str, Any]:
        """Waits for the run to end well; returns its summary."""
        process = self.start(*arguments)
        assert process.wait(PATIENCE_SECONDS) == 0, self.output.read_text()
        summary: dict[str, Any] = json.loads((self.run / "summary.json").read_text())
        assert summary["status"] == "completed"
        return summary

    def stop_when(self, ready: Callable[[], bool], how: int, *arguments: str) -> str:
        """Starts it, sends the signal as soon as `ready`, and returns what it had printed when it ended."""
        process = self.start(*arguments)
        wait_until(lambda: ready() or process.poll() is not None)
        process.send_signal(how)
        assert process.wait(PATIENCE_SECONDS) != 0, "ended before it could be stopped"
        return self.output.read_text()

    def processes(self) -> dict[int, str]:
        """Command lines by id of what runs with this cache in its environment: the driver and all that Ray started."""
        return dict(_processes_with(f"XDG_CACHE_HOME={self.cache}"))

    def workers(self) -> list[str]:
        """All of them but two idle agents of Ray's, which outlive a killed driver by a minute."""
        return [line for line in self.processes().values() if not line.startswith(RAY_AGENTS)]

    def end(self) -> None:
        """Leaves nothing behind, whatever the test did."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def checkpoint(self, step: int) -> Path:
        return self.run / "checkpoints" / f"step_{step:06d}"


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def _processes_with(variable: str) -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name), (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # It ended while we looked, or is not ours to look at.


Complete = tuple[Command, dict[str, Any]]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Complete]:
    """A run that nobody disturbed, and its summary. To be read only."""
    command = Command(tmp_path_factory.mktemp("complete"))
    try:
        yield command, command.complete()
    finally:
        command.end()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    command = Command(tmp_path)
    yield command
    command.end()


@pytest.fixture(scope="module")
def digest(complete: Complete) -> str:
    return str(complete[1]["weights_digest"])


def test_run_folder_is_complete(complete: Complete) -> None:
    run = complete[0].run
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "base",
        "checkpoints",
        "evaluation",
        "metrics.jsonl",
        "policy",
        "recipe.yaml",
        "report.html",
        "rollouts",
        "summary.json",
        "tensorboard",
    }
    assert {path.name for path in (run / "rollouts").iterdir()} == {f"step_{n:06d}.jsonl" for n in range(1, STEPS + 1)}
    assert {path.name for path in (run / "evaluation").iterdir()} == {f"step_{n:06d}.json" for n in (0, 2, 4)}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_000003", "step_000004"}


def test_summary_says_what_happened(complete: Complete) -> None:
    _, summary = complete
    assert (summary["name"], summary["steps"], summary["regime"]) == ("tiny", STEPS, "aligned")
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["evaluation"]["before"]["problems"] == summary["evaluation"]["after"]["problems"] == 8
    assert summary["mismatch"]["tokens_compared"] > 1000 and summary["mismatch"]["full_vocab_rows"] > 50
    assert summary["mismatch"]["tokens_unequal"] == summary["mismatch"]["full_vocab_unequal"] == 0
    assert set(summary["durations"]) == {"warm_start", "evaluation", "training", "export", "total"}


def test_metrics_have_one_line_a_step_and_tensorboard_the_same_values(
    complete: Complete,
) -> None:
    run = complete[0].run
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(record["mismatch/tokens_unequal"] == record["mismatch/full_vocab_unequal"] == 0 for record in records)
    assert all((record["mismatch/tokens_compared"] or 0) > 0 for record in records)
    assert any((record["policy/grad_norm"] or 0) > 0 for record in records)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {name for record in records for name in record} - {"step"}
    for name in ("reward/mean", "policy/loss", "time/rollout"):
        expected = [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected


def test_recipe_rollouts_and_report_read_back(complete: Complete, tmp_path: Path) -> None:
    run = complete[0].run
    assert load_recipe(run / "recipe.yaml") == resolve(tiny_recipe(tmp_path))[0]
    for step in range(1, STEPS + 1):
        groups = read_json_lines(run / "rollouts" / f"step_{step:06d}.jsonl")
        assert len(groups) == PROMPTS and {group["step"] for group in groups} == {step}
        assert all(len(group["completions"]) == GROUP for group in groups)
    page = (run / "report.html").read_text()
    assert page.startswith("<!") and page.rstrip().endswith("</html>") and "completed" in page


def test_exported_policy_is_what_the_digest_says(complete: Complete, digest: str) -> None:
    folder = complete[0].run / "policy"
    tensors = load_file(folder / "model.safetensors")
    assert weights_digest({name: tensor_digest(tensor) for name, tensor in tensors.items()}) == digest
    assert policy_digest(load_policy(folder)) == digest
    assert load_tokenizer(folder).eos_token_id == load_policy(folder).config.eos_token_id


def test_newest_checkpoint_loads_and_holds_the_exported_weights(complete: Complete, digest: str) -> None:
    run, recipe = complete[0].run, load_recipe(complete[0].run / "recipe.yaml")
    trainer = Trainer(load_policy(run / "policy"), recipe.trainer, recipe.rollout.temperature)
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None and load_checkpoint(newest, trainer) == {"step": STEPS, "data_cursor": STEPS}
    assert (policy_digest(trainer.policy), trainer.policy_version) == (digest, STEPS)


def test_nothing_is_left_running(complete: Complete) -> None:
    """The workers' last moments are waited for, up to a limit that fails."""
    wait_until(lambda: complete[0].processes() == {})
    assert complete[0].processes() == {}


def test_without_ray_it_is_the_same_run(complete: Complete, digest: str, finished_run: Path) -> None:
    assert json.loads((finished_run / "summary.json").read_text())["weights_digest"] == digest
    for step in range(1, STEPS + 1):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (complete[0].run / name).read_text() == (finished_run / name).read_text()


def test_again_with_two_engines_it_ends_in_the_same_bits(command: Command, digest: str) -> None:
    """Its own cache: the base policy is made a second time too."""
    assert command.complete("rollout.workers=2")["weights_digest"] == digest


def test_killed_after_a_checkpoint_it_resumes_to_the_same_bits(command: Command, digest: str) -> None:
    command.stop_when(command.checkpoint(1).exists, signal.SIGKILL)
    assert not (command.run / "policy").exists()
    wait_until(lambda: command.workers() == [])
    summary = command.complete("--resume")
    assert summary["weights_digest"] == digest
    assert [record["step"] for record in read_metrics(command.run)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_killed_during_the_warm_start_it_resumes_to_the_same_bits(command: Command, digest: str) -> None:
    started = command.run / "summary.json"
    command.stop_when(lambda: started.exists() and _trainer_is_busy(command), signal.SIGKILL)
    assert not list(command.cache.glob("lockstep/base/*"))
    wait_until(lambda: command.processes() == {})
    assert command.complete("--resume")["weights_digest"] == digest


def _trainer_is_busy(command: Command) -> bool:
    return any("TrainerActor.supervised_step" in line for line in command.processes().values())


@pytest.mark.slow
def test_interrupted_it_says_how_to_go_on_and_does(command: Command, digest: str) -> None:
    output = command.stop_when(command.checkpoint(1).exists, signal.SIGINT)
    assert "interrupted; go on with --resume" in output and "Traceback" not in output
    assert json.loads((command.run / "summary.json").read_text())["status"] == "interrupted"
    wait_until(lambda: command.processes() == {})
    assert command.complete("--resume", "rollout.workers=2")["weights_digest"] == digest


@pytest.mark.slow
def test_a_dead_engine_is_replaced_and_the_bits_stay(command: Command, digest: str) -> None:
    process = command.start("rollout.workers=2")
    wait_until(command.checkpoint(1).exists)
    victim = next(pid for pid, line in command.processes().items() if "EngineActor" in line)
    os.kill(victim, signal.SIGKILL)
    assert process.wait(PATIENCE_SECONDS) == 0
    output = command.output.read_text()
    assert "died and was replaced; its requests are asked again" in output and "Traceback" not in output
    assert json.loads((command.run / "summary.json").read_text())["weights_digest"] == digest


@pytest.mark.slow
def test_a_dead_trainer_ends_the_run_with_a_message_and_it_resumes(command: Command, digest: str) -> None:
    process = command.start()
    wait_until(command.checkpoint(1).exists)
    for pid, line in command.processes().items():
        if "TrainerActor" in line:
            os.kill(pid, signal.SIGKILL)
    assert process.wait(PATIENCE_SECONDS) == 1
    output = command.output.read_text()
    assert "error: a worker died while the run waited for " in output and "Continue with --resume" in output
    assert "Traceback" not in output
    assert command.complete("--resume")["weights_digest"] == digest


@pytest.mark.slow
def test_asynchronous_tokens_are_those_of_their_own_version(command: Command) -> None:
    summary = command.complete("loop.max_staleness=1")
    assert summary["regime"] == "aligned; asynchronous, at most 1 versions stale"
    assert summary["mismatch"]["tokens_compared"] > 100 and summary["mismatch"]["tokens_unequal"] == 0
    groups = [read_json_lines(path) for path in sorted((command.run / "rollouts").iterdir())]
    stale = [g["step"] - 1 - c["policy_version"] for step in groups for g in step for c in g["completions"]]
    assert set(stale) <= {0, 1} and 1 in stale


@pytest.mark.slow
def test_small_engine_batches_end_in_the_same_bits(command: Command, digest: str) -> None:
    assert command.complete("rollout.max_batch=5", "rollout.prefill_tokens=16")["weights_digest"] == digest


@pytest.mark.slow
def test_another_seed_is_another_run(command: Command, digest: str) -> None:
    assert command.complete("seed=1")["weights_digest"] != digest


@pytest.mark.slow
def test_packing_changes_no_log_prob_of_the_first_step(complete: Complete, command: Command) -> None:
    """Gradients are summed by micro-batch, so later steps may differ; the log-probs before any step may not.

    The base policy comes from the first run's cache, because its warm start depends on the packing too.
    """
    (base,) = (complete[0].cache / "lockstep" / "base").iterdir()
    unset = ("policy.config={}", "policy.vocab_size=null", "warm_start=null", f"policy.path={base}")
    command.complete(*unset, "trainer.token_budget=64")
    first, other = (read_json_lines(run / "rollouts" / "step_000001.jsonl") for run in (complete[0].run, command.run))
    assert first == other


@pytest.mark.slow
def test_killed_with_dynamic_sampling_it_resumes_to_the_same_bits(command: Command, tmp_path: Path) -> None:
    """More batches of prompts have been drawn than steps were taken: the checkpoint must say how many."""
    dynamic = ("loop.dynamic_sampling.max_rounds=3",)
    (tmp_path / "whole").mkdir()
    whole = Command(tmp_path / "whole")
    try:
        digest = whole.complete(*dynamic)["weights_digest"]
    finally:
        whole.end()
    command.stop_when(command.checkpoint(2).exists, signal.SIGKILL, *dynamic)
    wait_until(lambda: command.workers() == [])
    assert command.complete("--resume", *dynamic)["weights_digest"] == digest
    assert max(record["sampling/rounds"] or 0 for record in read_metrics(command.run)) > 1
