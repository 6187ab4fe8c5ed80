"""Whole runs with a composed reward, without Ray: the same bits each time, and what failures do to a step."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from reward.composite import Reward, RewardInput
from rl.config import load_recipe
from rl.monitor import read_json_lines, read_metrics
from rl.reward_alarm import RewardFailureError
from rl.train import run_training
from rl.weight_sync import policy_digest
from tests.rl.tiny import GROUP, PROMPTS, LocalSystem, tiny_recipe

FUNCTION = """
def score(completion, prompt, num_tokens, level=0, **kwargs):
    if num_tokens > 5 and num_tokens % 3 == 0:
        raise ValueError(f"no reward for {num_tokens} tokens")
    return level + completion.count("=") / 8
"""
COMPONENTS = {
    "format": "{weight: 0.5, pattern: boxed}",
    "overlong": "{max_tokens: 40, buffer_tokens: 16}",
    "language": "{weight: 0.1}",
    "repetition": "{weight: 0.3, ngram: 3}",
    "function": "{path: mine.py:score, weight: 0.7}",
}
COMPOSED = [f"reward.components.{name}={section}" for name, section in COMPONENTS.items()]
FUNCTION_ONLY = COMPOSED[-1:]
STEPS = 2
BRIEF = ("data.eval_size=1", "evaluation.samples=1", "evaluation.every=0")
TOLERANT = "reward.max_failure_fraction=1"


@pytest.fixture(autouse=True)
def _with_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FUNCTION)


def train(folder: Path, *overrides: str, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    return run_training(tiny_recipe(folder, *BRIEF, *overrides), folder / "run", resume, console or Console(quiet=True))


def interrupted_after(step: int, patch: pytest.MonkeyPatch) -> None:
    rewards = LocalSystem.rewards

    def interrupted(self: LocalSystem, inputs: list[RewardInput]) -> list[Reward]:
        if self.trainer.target.trainer.policy_version == step:
            raise KeyboardInterrupt
        return rewards(self, inputs)

    patch.setattr(LocalSystem, "rewards", interrupted)


@pytest.mark.slow
def test_a_composed_reward_decides_the_same_bits_every_time(local: list[LocalSystem], tmp_path: Path) -> None:
    """Again with other workers and batches, interrupted and resumed; alarm and all."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    composed = (*COMPOSED, TOLERANT, f"loop.steps={STEPS}")
    digest = train(first, *composed)["weights_digest"]
    other = (*composed, "rollout.workers=3", "rollout.max_batch=5", "reward.workers=2")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(1, patch)
        train(second, *other)
    assert train(second, *other, resume=True)["weights_digest"] == digest
    for step in range(1, STEPS + 1):
        name = f"run/rollouts/step_{step:06d}.jsonl"
        assert (first / name).read_text() == (second / name).read_text()
    timed = ("time/", "tokens_per_second")
    records = [
        [{name: value for name, value in record.items() if not any(part in name for part in timed)} for record in each]
        for each in (read_metrics(first / "run"), read_metrics(second / "run"))
    ]
    assert records[0] == records[1]
    assert all(record["reward/mean"] != record["reward/correct_fraction"] for record in records[0])
    assert all({f"reward/{name}_mean" for name in COMPONENTS} < record.keys() for record in records[0])
    assert any((record["policy/grad_norm"] or 0) > 0 for record in records[0])


def test_failures_cost_their_completions_and_are_said(
    local: list[LocalSystem], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [
        {"problem": f"Find the remainder when 2*3+{n} is divided by 4.", "answer": (6 + n) % 4, "level": n}
        for n in range(1, 8)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    level = {problem["problem"]: problem["level"] for problem in problems}
    train(tmp_path, *FUNCTION_ONLY, TOLERANT, "data.train=mine.jsonl", "loop.steps=1", console=Console(width=300))
    groups = read_json_lines(tmp_path / "run/rollouts/step_000001.jsonl")
    completions = [(each, level[group["prompt"].strip()]) for group in groups for each in group["completions"]]
    failed = [each for each, _ in completions if len(each["tokens"]) > 5 and len(each["tokens"]) % 3 == 0]
    assert 0 < len(failed) < len(completions) == PROMPTS * GROUP
    assert all((each["reward"], each["reason"], each["advantage"]) == (None, "user_error", 0.0) for each in failed)
    for each, at_level in completions:
        if each not in failed:
            assert each["components"]["function"] == at_level + each["text"].count("=") / 8
            assert each["reward"] == each["components"]["correctness"] + 0.7 * each["components"]["function"]
    (record,) = read_metrics(tmp_path / "run")
    share = len(failed) / len(completions)
    assert record["reward/verifier_failures"] == len(failed)
    assert record["reward/reason/user_error"] == record["reward/failure_fraction"] == share
    assert (record["reward/failure_window_fraction"], record["reward/failure_alarm"]) == (share / 8, 1.0)
    assert record["reward/function_mean"] is not None and record["reward/correct_fraction"] is not None
    out = capsys.readouterr().out
    assert out.count("warning: rewards fail more often: ") == 1
    assert f"user_error {len(failed)}; the first says: ValueError: no reward for " in out


def test_too_many_failures_stop_the_run_before_a_weight_changes(local: list[LocalSystem], tmp_path: Path) -> None:
    """It goes on with a larger limit, but not with another function."""
    with pytest.raises(RewardFailureError, match=r"in step 1: user_error \d+; the first says: ValueError: no reward "):
        train(tmp_path, *FUNCTION_ONLY, "reward.max_failure_fraction=0", "loop.steps=1")
    assert local[0].trainer.target.trainer.policy_version == 0
    assert policy_digest(local[0].trained) == policy_digest(local[0].sampled)
    assert read_metrics(tmp_path / "run") == []
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"
    function = load_recipe(tmp_path / "run/recipe.yaml").reward.components.function
    assert function is not None and function.path == "mine.py:score" and len(function.sha256 or "") == 64
    (tmp_path / "mine.py").write_text(FUNCTION.replace("8", "9"))
    with pytest.raises(ValueError, match=rf"reward\.components\.function\.sha256: '{function.sha256}' before, "):
        train(tmp_path, *FUNCTION_ONLY, TOLERANT, "loop.steps=1", resume=True)
    (tmp_path / "mine.py").write_text(FUNCTION)
    assert train(tmp_path, *FUNCTION_ONLY, TOLERANT, "loop.steps=1", resume=True)["status"] == "completed"


def test_a_function_that_cannot_be_used_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(completion):\n    return 1\n")
    with pytest.raises(ValueError, match="fails on the completion"):
        train(tmp_path, *FUNCTION_ONLY)
    (tmp_path / "mine.py").unlink()
    with pytest.raises(ValueError, match=r"reward\.components\.function\.path: cannot read mine\.py in "):
        train(tmp_path, *FUNCTION_ONLY)
    assert not (tmp_path / "run").exists()
