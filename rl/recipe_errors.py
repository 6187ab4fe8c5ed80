"""What is wrong with a recipe, one line per problem, in terms of the keys that its author wrote."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

# Pydantic speaks of JSON where a recipe's author wrote YAML.
_IN_YAML = {
    "model_type": "should be a section of keys",
    "dict_type": "should be a mapping",
    "tuple_type": "should be a list",
}


def describe_problems(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line for each problem that pydantic found in a recipe of type `root`."""
    return [line for details in error.errors(include_url=False) for line in _describe(details, root)]


def _describe(details: ErrorDetails, root: type[BaseModel]) -> list[str]:
    key = _dotted(details["loc"])
    if details["type"] == "extra_forbidden":
        return [_unknown_key(details["loc"], root)]
    if details["type"] == "missing":
        return [f"{key}: required, but not given"]
    if details["type"] == "value_error":
        # Raised by a check of ours, which says itself what it got.
        rule = details["msg"].removeprefix("Value error, ")
        return [f"{key}: {rule}"] if key else rule.splitlines()
    rule = _IN_YAML.get(details["type"], details["msg"].removeprefix("Input "))
    return [f"{key}: {rule}, got {details['input']!r}"]


def _unknown_key(loc: Sequence[int | str], root: type[BaseModel]) -> str:
    prefix = _dotted(loc[:-1])
    section = _section_at(root, loc[:-1])
    siblings = [f"{prefix}.{name}".lstrip(".") for name in section.model_fields] if section else []
    elsewhere = [key for key in _all_keys(root, "") if key.split(".")[-1] == str(loc[-1])]
    key = _dotted(loc)
    nearest = difflib.get_close_matches(key, siblings, n=1) or elsewhere[:1]
    if nearest:
        return f"unknown key {key!r}: did you mean {nearest[0]!r}?"
    return f"unknown key {key!r}: the keys here are {', '.join(siblings)}"


def _dotted(loc: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in loc)


def _section_at(root: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = root
    named = False
    for part in loc:
        if isinstance(part, int) or named:  # a place in a list of sections, or a name in a mapping of them
            named = False
            continue
        field = section.model_fields.get(str(part)) if section else None
        section = _section_type(field.annotation) if field else None
        named = field is not None and get_origin(field.annotation) is dict
    return section


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation names: itself, or the one inside `Section | None` or `dict[str, Section]`."""
    parts = get_args(annotation)
    if not parts:
        return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return next((section for section in map(_section_type, parts) if section), None)


def _all_keys(root: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in root.model_fields.items():
        yield prefix + name
        section = _section_type(field.annotation)
        if section:
            yield from _all_keys(section, f"{prefix}{name}.")
