"""Exports: the same policy from the run, from its newest checkpoint, and a manifest that says what it is."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from policy.checkpoint import load_policy, tensor_digest, weights_digest
from policy.tokenizer import load_tokenizer
from rl.actors import policy_digest
from rl.config import load_recipe, recipe_digest
from rl.export import export_run, policy_folder, read_manifest
from tests.rl.tiny import STEPS


def test_manifest_ties_the_policy_to_its_run(finished_run: Path) -> None:
    folder = policy_folder(finished_run)
    assert folder == finished_run / "policy" == policy_folder(folder)
    manifest = read_manifest(folder)
    digests = {name: tensor_digest(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert manifest["tensor_digests"] == digests
    assert manifest["weights_digest"] == weights_digest(digests) == policy_digest(load_policy(folder))
    assert manifest["weights_digest"] == json.loads((finished_run / "summary.json").read_text())["weights_digest"]
    recipe = load_recipe(finished_run / "recipe.yaml")
    assert manifest["recipe_digest"] == recipe_digest(recipe.model_dump(mode="json"))
    assert (manifest["run"], manifest["step"]) == ("run", STEPS)
    assert (manifest["prompt_template"], manifest["answer_marker"]) == ("{problem}\n", "\\boxed")


def test_export_of_the_newest_checkpoint_is_the_runs_own_policy(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    digest, step = export_run(finished_run, out)
    assert step == STEPS
    assert read_manifest(out) == read_manifest(finished_run / "policy")
    assert digest == read_manifest(out)["weights_digest"]
    assert load_tokenizer(out).get_vocab() == load_tokenizer(finished_run / "policy").get_vocab()
    assert load_policy(out).config == load_policy(finished_run / "policy").config


def test_export_refuses_a_folder_with_something_in_it(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"is not empty; give a new folder in --out"):
        export_run(finished_run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_export_before_the_first_checkpoint_says_so(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("step_*"))
    with pytest.raises(ValueError, match=r"has no checkpoint yet; the first comes after loop\.checkpoint_every steps"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_from_elsewhere_gets_the_usual_prompt(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == {"prompt_template": "{problem}\n", "answer_marker": "\\boxed"}
