"""`lockstep bench alignment`: what takes turns with what, how costs are told, and that the process stays aligned."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ops
from policy.checkpoint import save_policy
from policy.transformer import Policy
from rl import bench_alignment
from rl.alignment_cost import Cost, shown_costs
from rl.bench_alignment import ALL, Load, measure
from rl.bench_operators import Shapes, operator_calls
from rl.bench_policy import Subject, subject_of
from rl.report import write_report
from tests.rl.command import lockstep, refusal
from tests.rl.tiny import tiny_recipe, write_recipe

TINY = Load(sequences=2, prompt=4, new_tokens=4, rounds=1)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return subject_of(write_recipe(tmp_path))


def test_operators_and_a_whole_step_are_measured(subject: Subject) -> None:
    result = measure(subject, TINY, lambda text: None)
    measured = [(cost["what"].split(",")[0], cost["fast"]) for cost in result["costs"]]
    forms = [*ops.FAST_FORMS, ALL]
    assert measured == [
        ("decode", "linear"),
        ("training", "linear"),
        ("decode", "rms_norm"),
        ("training", "rms_norm"),
        ("decode", "softmax_attention"),
        ("training", "softmax_attention"),
        ("decode", "lightning_attention"),
        *(("sampling", form) for form in forms),
        *(("training step", form) for form in forms if form != "lightning_attention"),
    ]
    assert all(cost["low"] <= cost["ratio"] <= cost["high"] for cost in result["costs"])
    assert not any(ops.is_fast(name) for name in ops.FAST_FORMS)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_forms_take_turns(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds that count, after one that does not; a round has the aligned form and every fast one."""
    clock, turns = iter([9.0, 9.0, 9.0, 6.0, 2.0, 3.0, 8.0, 2.0, 4.0]), list[list[str]]()

    def run() -> float:
        turns.append([name for name in ops.FAST_FORMS if ops.is_fast(name)])
        return next(clock)

    linear, everything = bench_alignment._costs("it", run, ["linear", ALL], 2, subject.device)
    ops.use_fast([])
    assert turns == [[], ["linear"], list(ops.FAST_FORMS)] * 3
    assert linear == Cost("it", "linear", aligned=7.0, unaligned=2.0, ratio=3.5, low=3.0, high=4.0)
    assert everything == Cost("it", ALL, aligned=7.0, unaligned=3.5, ratio=2.0, low=2.0, high=2.0)


def test_every_operator_gives_about_the_same_in_both_forms(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is the same work: shapes that fit, and results that differ by rounding only.

    Not of lightning attention, whose fast form keeps other things in its cache: no open chunk.
    """
    shapes = Shapes(sequences=3, context=20)
    calls = list(operator_calls(subject.config, torch.float32, subject.device, shapes))[:-1]
    assert {call.operator for call in calls} == ops.FAST_FORMS.keys() - {"lightning_attention"}
    found: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for fast in (False, True):
        for name in ops.FAST_FORMS:
            _record(monkeypatch, name, found[fast])
        ops.use_fast(ops.FAST_FORMS if fast else [])
        for call in calls:
            call.run()
        monkeypatch.undo()
    ops.use_fast([])
    assert len(found[True]) == len(found[False]) == 6
    # FP32 sums of at most 64 products of numbers near 1, in two orders: 64 * 2^-24 * (largest of some thousand) < 1e-4
    for aligned, fast in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(aligned, fast, rtol=1e-4, atol=1e-4)


def _record(monkeypatch: pytest.MonkeyPatch, name: str, outputs: list[torch.Tensor]) -> None:
    operator = getattr(ops, name)

    def recorded(*arguments: Any) -> torch.Tensor:
        outputs.append(operator(*arguments))
        return outputs[-1]

    monkeypatch.setattr(ops, name, recorded)


def test_a_policy_folder_is_measured_as_it_is(subject: Subject, tmp_path: Path) -> None:
    policy = Policy(subject.config, torch.float32)
    policy.initialize(seed=0)
    save_policy(tmp_path / "policy", policy)
    assert subject_of(tmp_path / "policy").config.hidden_size == subject.config.hidden_size == 32
    with pytest.raises(ValueError, match=r"is a policy without a recipe, so seed=1 has nothing to replace"):
        subject_of(tmp_path / "policy", ["seed=1"])


def test_a_run_keeps_its_costs_and_its_report_shows_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.move(write_recipe(tmp_path), run / "recipe.yaml")
    small = ("--sequences", 2, "--prompt", 4, "--new-tokens", 4, "--rounds", 1)
    result = lockstep("bench", "alignment", run, *small)
    assert result.exit_code == 0, result.output
    costs = shown_costs(run)
    assert costs is not None and len(costs.rows) == 16
    assert costs.headline.startswith("tiny, ") and "2 sequences of 4 + 4 tokens" in costs.headline
    page = (run / "report.html").read_text()
    assert "Cost of alignment" in page and costs.headline in page
    (run / "alignment_cost.json").unlink()
    assert "Cost of alignment" not in write_report(run).read_text()


def test_a_recipe_leaves_nothing_behind_unless_asked(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "out.json"
    small = ("--sequences", 1, "--prompt", 4, "--new-tokens", 2, "--rounds", 1)
    result = lockstep("bench", "alignment", recipe, "rollout.max_new_tokens=30", *small, "--json", out)
    assert result.exit_code == 0, result.output
    assert re.search(r"training step +│ all of them", result.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml", "out.json"}
    assert json.loads(out.read_text())["policy"] == "tiny"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "alignment_cost.json").write_text('{"costs": [{}]}')
    with pytest.raises(ValueError, match=r"alignment_cost\.json is not what `lockstep bench alignment` wrote .*remove"):
        shown_costs(tmp_path)
    assert "no such file" in refusal("bench", "alignment", tmp_path / "none.yaml")


def test_the_recipe_decides_type_and_threads(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    subject = subject_of(write_recipe(tmp_path))
    assert (subject.dtype, subject.threads) == (torch.float32, 1) == (torch.float32, recipe.trainer.threads)
    assert subject.token_budget == recipe.trainer.token_budget == 512
