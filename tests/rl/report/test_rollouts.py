"""Which rollouts the page holds, and what of them."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from rl.monitor import Record
from rl.report.rollouts import MAX_COMPLETIONS, MAX_STEPS, MAX_TOKENS, cut, read_rollouts
from tests.rl.report.folders import group, run_folder


def test_few_steps_are_shown_whole_in_their_order(tmp_path: Path) -> None:
    rollouts = {step: [group(step, completions=20, tokens=900)] * 2 for step in (1, 2, 9)}
    shown = read_rollouts(run_folder(tmp_path, rollouts=rollouts), [])
    assert [each["step"] for each in shown.groups] == [1, 1, 2, 2, 9, 9]
    assert shown.note == "6 of the 6 groups recorded at 3 of 3 steps"
    assert {(len(each["completions"]), each["count"]) for each in shown.groups} == {(MAX_COMPLETIONS, 20)}
    lengths = {
        (len(one["tokens"]), len(one["sampler"]), one["count"]) for each in shown.groups for one in each["completions"]
    }
    assert lengths == {(MAX_TOKENS, MAX_TOKENS, 900)}


def test_of_many_steps_those_spread_over_the_run_and_the_worst_are_shown(tmp_path: Path) -> None:
    records: list[Record] = [{"step": step, "mismatch/log_prob_diff_max": float(step == 37)} for step in range(1, 101)]
    run = run_folder(tmp_path, rollouts={step: [group(step)] for step in range(1, 101)})
    steps = [each["step"] for each in read_rollouts(run, records).groups]
    assert len(steps) == MAX_STEPS + 1 and steps[0] == 1 and steps[-1] == 100 and 37 in steps
    assert max(after - before for before, after in itertools.pairwise(steps)) <= 5
    assert len(read_rollouts(run, []).groups) == MAX_STEPS


def test_a_budget_is_spent_on_first_groups_before_second_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path, rollouts={step: [group(step), group(step)] for step in (1, 2, 3)})
    size = len(json.dumps(read_rollouts(run, []).groups[0]))
    monkeypatch.setattr("rl.report.rollouts.MAX_BYTES", 4 * size)
    shown = read_rollouts(run, [])
    assert [each["step"] for each in shown.groups] == [1, 1, 2, 3]
    assert shown.note == "4 of the 6 groups recorded at 3 of 3 steps"


def test_a_completion_keeps_what_the_strips_show(tmp_path: Path) -> None:
    record = _recorded(
        tokens=["a", "\n", "", "d"],
        rollout_log_probs=[0.0, -0.1, math.nan, -0.5],
        log_probs=[-0.25, -0.1, -0.3, -0.5],
        entropies=[0.5, 0.25, 0.125, 0.0],
        policy_versions=[1, 1, 2, 2],
        policy_version=2,
    )
    shown = _completion(tmp_path, record)
    assert shown["tokens"] == ["a", "⏎\n", "∅", "d"]
    assert shown["sampler"] == [0.0, -0.1, None, -0.5] and shown["trainer"] == [-0.25, -0.1, -0.3, -0.5]
    assert shown["entropies"] == [0.5, 0.25, 0.125, 0.0] and shown["versions"] == [1, 1, 2, 2]


def test_equal_log_probs_are_kept_once_and_what_was_not_recorded_is_missing(tmp_path: Path) -> None:
    shown = _completion(tmp_path, _recorded())
    assert shown["trainer"] is None and shown["entropies"] == [] and shown["versions"] == [None]


def test_numbers_tell_any_two_float32_apart(tmp_path: Path) -> None:
    """-0.1 in float32 and its neighbour."""
    shown = _completion(tmp_path, _recorded(rollout_log_probs=[-0.10000000149011612, -0.09999999403953552, 0.0]))
    assert shown["sampler"][:2] == [-0.100000001, -0.099999994]


def test_components_are_shown_where_there_are_several(tmp_path: Path) -> None:
    parts = {"correctness": None, "overlong": -0.25}
    assert _completion(tmp_path / "a", _recorded(reward=None, components=parts))["components"] == parts
    assert _completion(tmp_path / "b", _recorded(components={"correctness": 1.0}))["components"] == {}


def test_the_scatter_takes_tokens_evenly_from_all_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path, rollouts={1: [group(1, completions=2, tokens=3)]})
    half = math.exp(-0.5)
    assert read_rollouts(run, []).probabilities() == [(half, half)] * 6
    monkeypatch.setattr("rl.report.rollouts.MAX_POINTS", 4)
    assert len(read_rollouts(run, []).probabilities()) == 3


def test_a_long_text_says_how_much_it_left_out() -> None:
    assert cut("x" * 2000) == "x" * 2000
    assert cut("x" * 5000) == "x" * 2000 + " … [3,000 more characters]"


def _recorded(**changes: Any) -> dict[str, Any]:
    record = group(1, completions=1)
    record["completions"][0] |= changes
    return record


def _completion(run_dir: Path, record: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = read_rollouts(run_folder(run_dir, rollouts={1: [record]}), []).groups[0]["completions"][0]
    return shown
