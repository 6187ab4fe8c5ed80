"""Whole runs in this process, without Ray: the bits they end in, resume, a mismatch, a full disk."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from policy.checkpoint import DTYPES, load_policy
from reward.composite import RewardInput
from rl.base_policy import cache_folder
from rl.data_columns import Row
from rl.export import export_run
from rl.mismatch import MismatchError
from rl.monitor import read_metrics
from rl.prompts import Prompt
from rl.step_sampling import step_requests
from rl.train import FREE_KEYS, run_training
from rl.weight_sync import policy_digest
from rollout.request import Completion, Request
from tests.rl.tiny import STEPS, LocalSystem, full_disk_at, tiny_recipe

QUIET = Console(quiet=True)


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def train(folder: Path, *overrides: str, resume: bool = False, console: Console = QUIET) -> Path:
    run_training(tiny_recipe(folder, *overrides), folder / "run", resume, console)
    return folder / "run"


def test_every_step_learns_and_no_bit_differs(finished_run: Path) -> None:
    records = read_metrics(finished_run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(record["mismatch/tokens_unequal"] == record["mismatch/full_vocab_unequal"] == 0 for record in records)
    assert all((record["mismatch/tokens_compared"] or 0) > 100 for record in records)
    assert all((record["mismatch/full_vocab_rows"] or 0) > 10 for record in records)
    assert sum((record["policy/grad_norm"] or 0) > 0 for record in records) > STEPS / 2
    assert all(record["policy/ratio_max"] == 1.0 and record["policy/approx_kl"] == 0.0 for record in records)
    assert [record["step"] for record in records if "eval/avg@2" in record] == [2]


def test_training_changed_the_base_policy(finished_run: Path, local: list[LocalSystem], tmp_path: Path) -> None:
    base = load_policy(cache_folder(tiny_recipe(tmp_path)))
    assert policy_digest(load_policy(finished_run / "policy")) != policy_digest(base)


def test_how_it_was_sampled_changes_no_bit(finished_run: Path, local: list[LocalSystem], tmp_path: Path) -> None:
    run = train(tmp_path, "rollout.workers=3", "rollout.max_batch=5", "rollout.prefill_tokens=16")
    assert len(local[0].engines) == 3
    assert summary_of(run)["weights_digest"] == summary_of(finished_run)["weights_digest"]
    last = "rollouts/step_000004.jsonl"
    assert (run / last).read_text() == (finished_run / last).read_text()


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in the step after `step`, once it has been sampled."""
    rewards = LocalSystem.rewards

    def interrupted(self: LocalSystem, inputs: list[RewardInput]) -> Any:
        if self.trainer.target.trainer.policy_version == step:
            raise KeyboardInterrupt
        return rewards(self, inputs)

    monkeypatch.setattr(LocalSystem, "rewards", interrupted)


def test_interrupted_and_resumed_ends_in_the_same_bits(
    finished_run: Path, local: list[LocalSystem], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _interrupt_after(patch, step=3)
        train(tmp_path, "loop.checkpoint_every=2")
    summary = summary_of(tmp_path / "run")
    assert (summary["status"], summary["error"]) == ("interrupted", "KeyboardInterrupt: ")
    assert len(read_metrics(tmp_path / "run")) == 3
    run = train(tmp_path, "rollout.workers=2", resume=True)
    assert summary_of(run)["weights_digest"] == summary_of(finished_run)["weights_digest"]
    assert "error" not in summary_of(run)
    assert [record["step"] for record in read_metrics(run)] == list(range(1, STEPS + 1))
    assert summary_of(run)["mismatch"] == summary_of(finished_run)["mismatch"]


def test_a_completed_run_resumes_to_itself(finished_run: Path, local: list[LocalSystem], tmp_path: Path) -> None:
    run = train(tmp_path)
    first = summary_of(run)
    again = summary_of(train(tmp_path, resume=True))
    assert again["weights_digest"] == first["weights_digest"] and again["evaluation"] == first["evaluation"]


def test_resume_refuses_another_recipe_and_lists_every_difference(local: list[LocalSystem], tmp_path: Path) -> None:
    run = train(tmp_path, "loop.steps=1", "warm_start.steps=1", "policy.config.rope_theta=5000.0")
    with pytest.raises(ValueError) as error:
        train(tmp_path, "loop.steps=2", "warm_start.steps=1", "seed=5", resume=True)
    message = str(error.value)
    assert message.startswith(f"{run} was started with another recipe; resume it with the same one. Different: ")
    for difference in (
        "seed: 0 before, 5 now",
        "policy.config.rope_theta: 5000.0 before, None now",
        "loop.steps: 1 before, 2 now",
    ):
        assert difference in message
    assert message.count(" before, ") == 3


def test_resume_accepts_what_cannot_change_a_bit(local: list[LocalSystem], tmp_path: Path) -> None:
    first = summary_of(train(tmp_path, "loop.steps=1"))
    free = {
        "rollout.workers": "2",
        "rollout.threads": "2",
        "rollout.max_batch": "7",
        "rollout.prefill_tokens": "64",
        "rollout.memory_mb": "33",
        "ray.address": "elsewhere",
        "reward.workers": "2",
        "reward.max_failure_fraction": "0.5",
        "reward.failure_window": "2",
        "loop.checkpoint_every": "2",
        "loop.keep_checkpoints": "1",
        "loop.rollouts_saved": "1",
        "loop.on_mismatch": "warn",
        "monitor.names": "[verl]",
    }
    assert all(any(key.startswith(name) for key in free) for name in FREE_KEYS)
    overrides = [f"{key}={value}" for key, value in free.items()]
    run = train(tmp_path, "loop.steps=1", *overrides, resume=True)
    assert summary_of(run)["weights_digest"] == first["weights_digest"]


def _machine(monkeypatch: pytest.MonkeyPatch, faster: torch.dtype, cores: int) -> None:
    def choose(setting: str, device: torch.device) -> tuple[torch.dtype, str]:
        return (faster, "measured") if setting == "auto" else (DTYPES[setting], "asked")

    monkeypatch.setattr("rl.train.choose_dtype", choose)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))


def test_resume_keeps_what_the_machine_decided(
    local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dtype auto is settled by a measurement, which may come out otherwise the second time."""
    short = ("loop.steps=1", "warm_start.steps=1")
    auto = (*short, "policy.dtype=auto", "trainer.threads=null")
    _machine(monkeypatch, torch.float32, cores=2)
    first = summary_of(train(tmp_path, *auto))
    _machine(monkeypatch, torch.bfloat16, cores=64)
    run = train(tmp_path, *auto, resume=True)
    assert summary_of(run)["weights_digest"] == first["weights_digest"]
    with pytest.raises(ValueError, match=r"Different: policy\.dtype: 'float32' before, 'bfloat16' now$"):
        train(tmp_path, *short, "policy.dtype=bfloat16", "trainer.threads=2", resume=True)


def _unequal_at_step_2(change: Callable[[Completion], Completion]) -> Callable[..., list[Completion]]:
    """An engine that records something else for the second sample of the second prompt of step 2."""
    generate = LocalSystem.generate

    def generate_unequal(self: LocalSystem, requests: list[Request]) -> list[Completion]:
        completions = generate(self, requests)
        if requests[0].step == 2:
            completions[5] = change(completions[5])
        return completions

    return generate_unequal


def _one_ulp(completion: Completion) -> Completion:
    log_probs = completion.log_probs.copy()
    log_probs[2] = np.nextafter(log_probs[2], np.float32(-100))
    return replace(completion, log_probs=log_probs)


def test_mismatch_stops_the_run_before_a_weight_changes(
    local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalSystem, "generate", _unequal_at_step_2(_one_ulp))
    with pytest.raises(MismatchError) as error:
        train(tmp_path)
    message = str(error.value)
    assert "trainer and engine disagree on 1 of " in message
    assert "first at step 2, prompt remainder-" in message
    assert ", sample 1, completion token 2: trainer -" in message
    assert "No weight was changed by this step" in message
    assert summary_of(tmp_path / "run")["status"] == "failed"
    assert message in summary_of(tmp_path / "run")["error"]
    # The engines hold the weights after step 1, and so still does the trainer.
    assert policy_digest(local[0].trained) == policy_digest(local[0].sampled)
    assert local[0].trainer.target.trainer.policy_version == 1
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1]


def test_mismatch_is_recorded_and_the_run_goes_on_where_the_recipe_says_so(
    local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LocalSystem, "generate", _unequal_at_step_2(_one_ulp))
    run = train(tmp_path, "loop.on_mismatch=warn", console=Console(width=200))
    out = capsys.readouterr().out
    assert out.count("warning: trainer and engine disagree on 1 of ") == 1
    assert "No weight was changed" not in out
    assert [record["mismatch/tokens_unequal"] for record in read_metrics(run)] == [0, 1, 0, 0]
    assert summary_of(run)["mismatch"]["tokens_unequal"] == 1
    assert summary_of(run)["status"] == "completed"


def test_mismatch_beyond_the_sampled_token_stops_the_run_too(
    local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(completion: Completion) -> Completion:
        assert completion.full_log_probs is not None
        rows = completion.full_log_probs.copy()
        token = (int(completion.token_ids[1]) + 1) % rows.shape[1]
        rows[1, token] = np.nextafter(rows[1, token], np.float32(-100))
        return replace(completion, full_log_probs=rows)

    monkeypatch.setattr(LocalSystem, "generate", _unequal_at_step_2(change))
    with pytest.raises(MismatchError, match=r"0 of \d+ sampled tokens and 1 entries .* token 1, vocabulary entry \d+:"):
        train(tmp_path, "loop.full_vocab_sequences=16")
    assert policy_digest(local[0].trained) == policy_digest(local[0].sampled)


@pytest.mark.parametrize("file", [5, 6], ids=["tensors", "state"])
def test_a_checkpoint_that_cannot_be_written_leaves_a_run_that_goes_on(
    finished_run: Path, local: list[LocalSystem], tmp_path: Path, file: int
) -> None:
    """Two files a checkpoint: the disk is full at step 3."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
        patch.setattr("trainer.state._write_file", full_disk_at("trainer.state._write_file", file))
        train(tmp_path)
    run = tmp_path / "run"
    assert summary_of(run)["status"] == "failed"
    assert "No space left on device" in summary_of(run)["error"]
    assert len(read_metrics(run)) == 3
    assert export_run(run, tmp_path / "exported")[1] == 2
    train(tmp_path, resume=True)
    assert summary_of(run)["weights_digest"] == summary_of(finished_run)["weights_digest"]
    assert [record["step"] for record in read_metrics(run)] == list(range(1, STEPS + 1))


def test_a_row_asked_twice_in_a_step_draws_twice(tmp_path: Path) -> None:
    rows = [Prompt(Row(str(index), "p", "1", "s"), index, "p", np.array([3, 4])) for index in range(3)]
    asked = Counter[int]()
    requests = step_requests(tiny_recipe(tmp_path), 7, [rows[2], rows[0], rows[2], rows[2]], 3, asked)
    assert [request.prompt for request in requests] == [2, 0, 5, 8]
    assert [request.request_id for request in requests] == [0, 1, 2, 3]
    assert any(request.full_vocab_samples for request in requests)
    again = step_requests(tiny_recipe(tmp_path), 7, [rows[2], rows[1]], 3, asked)
    assert [request.prompt for request in again] == [11, 1]
    assert not any(request.full_vocab_samples for request in again)
