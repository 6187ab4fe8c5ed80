"""What a run's recipe changes against another one, or against the defaults."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rl.config import Recipe, load_recipe
from rl.recipe_yaml import parse_mapping

ABSENT = "-"


def recipe_changes(run: Mapping[str, Any], base: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, value of the base, value of the run) of every key whose values differ; `ABSENT` where a recipe has none."""
    ours, theirs = flat(run), flat(base)
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return [(key, _shown(theirs, key), _shown(ours, key)) for key in keys]


def base_recipe(base: Path | None) -> tuple[str, dict[str, Any]]:
    """What is said of the base, and its values: a recipe file, or the recipe of a run folder; None is the defaults.

    Raises ValueError for a recipe that cannot be used.
    """
    if base is None:
        return "the defaults", default_values(Recipe)
    if base.is_dir():
        path = base / "recipe.yaml"
        if not path.is_file():
            raise ValueError(f"{base} has no recipe.yaml; give a recipe file or the folder of a run as base")
        return str(base), parse_mapping(path.read_text(encoding="utf-8"), str(path))
    return str(base), load_recipe(base).model_dump(mode="json")


def default_values(model: type[BaseModel]) -> dict[str, Any]:
    """Every field that has a default, by section; of a section that a recipe must give, the defaults within it."""
    values = model.model_construct().model_dump(mode="json")
    for name, field in model.model_fields.items():
        section = field.annotation
        if field.is_required() and isinstance(section, type) and issubclass(section, BaseModel):
            values[name] = default_values(section)
    return values


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key. An empty section, and null, are as absent ones."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[prefix + str(key)] = value
    return found


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False, default=str) if key in values else ABSENT
