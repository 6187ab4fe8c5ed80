"""What a recipe changes against the defaults, a recipe file or another run."""

from pathlib import Path

import pytest

from rl.config import Recipe, resolved_yaml
from rl.report.recipe_changes import base_recipe, default_values, flat, recipe_changes
from rollout.config import RolloutConfig
from tests.rl.tiny import tiny_recipe, write_recipe


def test_a_recipe_is_shown_against_the_defaults(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path).model_dump(mode="json")
    changes = {key: (before, after) for key, before, after in recipe_changes(recipe, default_values(Recipe))}
    default = RolloutConfig().max_new_tokens
    assert changes["rollout.max_new_tokens"] == (str(default), "40")
    assert changes["loop.steps"] == ("-", "4")  # a recipe must give it
    assert changes["warm_start.steps"] == ("-", "60")  # off by default
    assert changes["data.families"][1] == '["remainder"]'
    assert "loop.on_mismatch" not in changes and "lora" not in changes


def test_every_default_is_that_of_a_recipe_that_gives_only_what_it_must(tmp_path: Path) -> None:
    path = tmp_path / "least.yaml"
    path.write_text("name: least\npolicy: {path: x}\ndata: {}\nloop: {steps: 1, prompts_per_step: 1, group_size: 2}\n")
    _, least = base_recipe(path)
    changed = [key for key, _, _ in recipe_changes(least, default_values(Recipe))]
    assert sorted(changed) == ["loop.group_size", "loop.prompts_per_step", "loop.steps", "name", "policy.path"]


def test_the_base_may_be_a_recipe_file_or_a_run(tmp_path: Path) -> None:
    ours = tiny_recipe(tmp_path, "seed=3", "loop.steps=9").model_dump(mode="json")
    expected = [("seed", "0", "3"), ("loop.steps", "4", "9")]
    name, theirs = base_recipe(write_recipe(tmp_path))
    assert name.endswith("tiny.yaml") and recipe_changes(ours, theirs) == expected
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(resolved_yaml(tiny_recipe(tmp_path)))
    assert recipe_changes(ours, base_recipe(tmp_path / "run")[1]) == expected


def test_what_only_the_base_has_is_a_change_too() -> None:
    assert recipe_changes({"a": {"b": 1}}, {"a": {"b": 1, "c": "x"}, "d": None}) == [("a.c", '"x"', "-")]


def test_a_folder_that_is_no_run_is_refused_as_base(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no recipe\.yaml; give a recipe file or the folder of a run"):
        base_recipe(tmp_path)


def test_flat_keys_are_dotted_and_nothing_is_not_a_value() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": None, "f": [1]}) == {"a.b.c": 1, "f": [1]}
