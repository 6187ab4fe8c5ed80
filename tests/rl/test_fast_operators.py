"""Operators in their fast, unaligned form: asked for in the recipe, taken in every process, said everywhere."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import ops
from rl.config import FAST_OPERATORS, Recipe, load_recipe, warm_start_digest
from rl.doctor_paths import OPERATORS, path_checks
from rl.monitor import read_metrics
from rl.train import plan, run_training
from tests.rl.tiny import LocalSystem, tiny_recipe

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def quickstart(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, overrides)


def test_the_recipe_knows_the_operators_that_have_a_fast_form() -> None:
    assert tuple(ops.FAST_FORMS) == FAST_OPERATORS


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ops.fast=[liner]", "ops.fast: no fast form of 'liner': did you mean 'linear'?"),
        ("ops.fast=[zzz]", "ops.fast: no fast form of 'zzz': there is one of linear, rms_norm, "),
        ("ops.fast=[linear, experts]", "ops.fast: no fast form of 'experts': there is one of linear, rms_norm, "),
        ("ops.fast=linear", "ops.fast: should be a list, got 'linear'"),
        ("ops.fats=[linear]", "unknown key 'ops.fats': did you mean 'ops.fast'?"),
    ],
)
def test_what_has_no_fast_form_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        quickstart(override, "loop.on_mismatch=warn")


def test_a_run_that_would_stop_at_its_first_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ops\.fast: linear, rms_norm in fast form .*; set loop\.on_mismatch=warn$"):
        quickstart("ops.fast=[linear, rms_norm]")
    assert quickstart("ops.fast=[linear, rms_norm]", "loop.on_mismatch=warn").ops.fast == ("linear", "rms_norm")
    assert quickstart().ops.fast == ()


def test_a_base_policy_made_otherwise_is_another() -> None:
    fast = quickstart("ops.fast=[linear]", "loop.on_mismatch=warn")
    assert warm_start_digest(fast) != warm_start_digest(quickstart())


def test_both_sides_take_the_fast_form_and_the_run_says_so(
    local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decode step by recurrence has other bits than the chunks that the trainer computes in."""
    asked: list[list[str]] = []
    monkeypatch.setattr("rl.actors.ops", SimpleNamespace(use_fast=lambda names: _use(asked, names)))
    recipe = tiny_recipe(tmp_path, "ops.fast=[lightning_attention]", "loop.on_mismatch=warn", "loop.steps=1")
    assert "regime: not aligned: fast lightning_attention" in plan(recipe).splitlines()
    summary = run_training(recipe, tmp_path / "run", resume=False, console=Console(width=200))
    assert asked == [["lightning_attention"]] * 2
    assert ops.explain("lightning_attention", torch.empty(0)).startswith("lightning_attention: cpu")
    (record,) = read_metrics(tmp_path / "run")
    assert (record["mismatch/tokens_unequal"] or 0) > 0 and (record["mismatch/log_prob_diff_max"] or 0) < 1e-3
    assert summary["regime"] == "not aligned: fast lightning_attention"
    assert "not aligned: fast lightning_attention" in (tmp_path / "run" / "report.html").read_text()
    assert re.search(r"regime +│ +not aligned: fast lightning_attention", capsys.readouterr().out)


def _use(asked: list[list[str]], names: tuple[str, ...]) -> None:
    asked.append(list(names))
    ops.use_fast(names)


def test_doctor_says_which_path_each_operator_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.doctor_paths.choose_device", lambda setting: torch.device("cpu"))
    checks = list(path_checks())
    assert [check.name for check in checks] == [f"{operator}, path" for operator in OPERATORS]
    assert {(check.status, check.detail) for check in checks} == {("ok", "cpu (cpu has no Triton)")}


def test_doctor_finds_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(operator: str, x: Any) -> str:
        raise RuntimeError(f"{operator} on cuda:0 needs Triton")

    monkeypatch.setattr(ops, "explain", explain)
    check = next(path_checks())
    assert (check.status, check.detail) == ("fail", "linear on cuda:0 needs Triton")
    assert check.remedy == "run `pip install 'lockstep-rl[gpu]'`"


def test_doctor_names_every_operator_that_chooses_a_path() -> None:
    sources = Path(ops.__file__).parent.glob("*.py")
    choosing = {name for source in sources for name in re.findall(r'\bchoose\("(\w+)"', source.read_text())}
    assert choosing - set(OPERATORS) == {"lightning_attention_training", "lightning_recurrence"}
    assert set(OPERATORS) <= choosing
