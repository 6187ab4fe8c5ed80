"""Scored completions: as training samples, as metrics, and as records that can be read back."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from policy.tokenizer import train_tokenizer
from reward.composite import Reward
from reward.result import Reason, RewardResult
from rl.rollouts import Scored, rollout_metrics, write_rollouts
from tests.rl.tiny import make_prompt, make_scored

RIGHT, WRONG = Reason.CORRECT, Reason.WRONG
RIGHT_VERDICT, WRONG_VERDICT, FAILED_VERDICT = (
    RewardResult.of(reason, "7", 0.5) for reason in (RIGHT, WRONG, Reason.TIMEOUT)
)
FIRST, SECOND = make_prompt(0, "7", ids=(5, 6)), make_prompt(1, "8", ids=(9,))
SCORED = [
    make_scored(FIRST, 0, (1, 2, 3), RIGHT, 1.0),
    make_scored(FIRST, 1, (4,), Reason.NO_ANSWER, -1.0, "length"),
    make_scored(SECOND, 0, (1, 2), WRONG, 0.0),
    make_scored(SECOND, 1, (1, 2), Reason.TIMEOUT, 0.0),
]


def test_sample_is_prompt_then_completion_with_the_engines_record() -> None:
    sample = SCORED[0].to_sample()
    assert sample.input_ids.tolist() == [5, 6, 1, 2, 3]
    assert (sample.prompt_length, sample.advantage) == (2, 1.0)
    assert sample.rollout_log_probs.tolist() == [-0.5, -1.0, -1.5]


def test_metrics_by_hand() -> None:
    """One of three rewards is 1; the fourth completion has none, which is not a reward of 0."""
    metrics = rollout_metrics(SCORED, group_size=2)
    assert metrics["reward/mean"] == metrics["reward/correct_fraction"] == pytest.approx(1 / 3)
    assert metrics["reward/std"] == pytest.approx(2**0.5 / 3)
    assert metrics["reward/no_answer_fraction"] == 0.25
    assert metrics["reward/verifier_failures"] == 1.0
    reasons = {name: value for name, value in metrics.items() if name.startswith("reward/reason/") and value}
    assert reasons == {f"reward/reason/{reason}": 0.25 for reason in ("correct", "no_answer", "wrong", "timeout")}
    assert "reward/reason/bad_gold" in metrics and "reward/correctness_mean" not in metrics
    assert (metrics["length/mean"], metrics["length/max"]) == (2.0, 3.0)
    assert metrics["length/truncated_fraction"] == 0.25
    assert metrics["policy/groups_without_signal"] == 1.0
    assert all(type(value) is float for value in metrics.values())


def test_components_are_averaged_apart_from_the_total() -> None:
    """Totals 1.5, 0.5 and none: the third has a format, but no reward."""
    rewards = [
        Reward(1.5, {"correctness": 1.0, "format": 1.0}, RIGHT_VERDICT, RIGHT),
        Reward(0.5, {"correctness": 0.0, "format": 1.0}, WRONG_VERDICT, WRONG),
        Reward(None, {"correctness": None, "format": 0.0}, FAILED_VERDICT, Reason.TIMEOUT),
    ]
    metrics = rollout_metrics([replace(SCORED[0], reward=reward) for reward in rewards], group_size=3)
    names = ("reward/mean", "reward/correct_fraction", "reward/format_mean", "reward/verifier_failures")
    assert [metrics[name] for name in names] == [1.0, 0.5, 1.0, 1.0]


def test_a_step_without_any_reward_has_no_mean() -> None:
    metrics = rollout_metrics([SCORED[3]] * 2, group_size=2)
    assert np.isnan([metrics["reward/mean"], metrics["reward/std"], metrics["reward/correct_fraction"]]).all()
    assert metrics["reward/reason/timeout"] == metrics["policy/groups_without_signal"] == 1.0


def test_a_record_without_a_reward_says_why(tmp_path: Path) -> None:
    _, second = _written(tmp_path / "step.jsonl", SCORED, groups=2)
    completion = second["completions"][1]  # type: ignore[index]
    assert (completion["reward"], completion["components"], completion["reason"]) == (
        None,
        {"correctness": None},
        "timeout",
    )


def _written(path: Path, scored: list[Scored], groups: int) -> list[dict[str, object]]:
    log_probs = [each.completion.log_probs - np.float32(0.25) for each in scored]
    entropies = [np.full(len(each), 1 / 3, dtype=np.float32) for each in log_probs]
    write_rollouts(path, 12, scored, log_probs, entropies, train_tokenizer(["so 7"], 300), group_size=2, groups=groups)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_hold_a_group_a_line(tmp_path: Path) -> None:
    first, second = _written(tmp_path / "rollouts" / "step.jsonl", SCORED, groups=9)
    assert (first["step"], first["prompt_id"], first["gold"]) == (12, "row-0", "7")
    assert first["prompt"] == "Problem 0?\n"
    assert second["prompt_id"] == "row-1"
    completion = first["completions"][0]  # type: ignore[index]
    assert completion.pop("tokens") and completion == {
        "text": "so \\boxed{7}",
        "rollout_log_probs": [-0.5, -1.0, -1.5],
        "log_probs": [-0.75, -1.25, -1.75],
        "entropies": [0.3333] * 3,
        "reward": 1.0,
        "components": {"correctness": 1.0},
        "reason": "correct",
        "extracted": "7",
        "finish_reason": "stop",
        "policy_version": 3,
        "advantage": 1.0,
    }


def test_a_completion_under_several_versions_says_which_drew_each_token(tmp_path: Path) -> None:
    mixed = replace(SCORED[0], completion=replace(SCORED[0].completion, policy_versions=np.array([2, 2, 3])))
    record = _written(tmp_path / "step.jsonl", [mixed, SCORED[1]], groups=1)[0]
    first, second = record["completions"]  # type: ignore[misc, index, attr-defined]
    assert (first["policy_version"], first["policy_versions"]) == (3, [2, 2, 3])
    assert "policy_versions" not in second


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_only_the_first_groups_are_kept(tmp_path: Path, groups: int) -> None:
    records = _written(tmp_path / "step.jsonl", SCORED, groups)
    assert [record["prompt_id"] for record in records] == ["row-0", "row-1"][:groups]


def test_a_float32_log_prob_survives_json(tmp_path: Path) -> None:
    odd = np.float32(-0.1)
    scored = make_scored(FIRST, 0, (1, 2), RIGHT, 0.0)
    scored.completion.log_probs[:] = [odd, np.nextafter(odd, np.float32(0))]
    record = _written(tmp_path / "step.jsonl", [scored, scored], groups=1)[0]
    back = np.array(record["completions"][0]["rollout_log_probs"], dtype=np.float32)  # type: ignore[index]
    assert np.array_equal(back, scored.completion.log_probs)
