"""Recipe text to mapping and back: strict YAML, and `a.b=value` overrides."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

# YAML 1.1 wants a dot and a signed exponent in a float, so that `3e-5` would be read as a string.
_EXPONENT_FLOAT = re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """The safe loader, refusing repeated keys (YAML itself would keep the last one in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice; keep one", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper, quoting every string that `_Loader` would read as a number."""


for _base in (_Loader, _Dumper):
    _base.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+0123456789"))


def parse_mapping(text: str, source: str) -> dict[str, Any]:
    """Read YAML text that holds one mapping. `source` names it in the `ValueError` for anything else."""
    document = _parse(text, source)
    if not isinstance(document, dict):
        found = "nothing" if document is None else f"a {type(document).__name__}"
        raise ValueError(f"{source}: expected a mapping of keys to values, found {found}")
    return document


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `mapping` with each `a.b=value` set, the value read as YAML.

    Sections on the way that are absent or null come into being. Raises `ValueError` for an override without a
    key or a value, for one that reaches into something that is no section, and for a key overridden twice.
    """
    result: dict[str, Any] = dict(mapping)
    seen: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"override {override!r}: expected key=value, such as loop.steps=10")
        if key in seen:
            raise ValueError(f"override {override!r}: {key} is overridden twice; keep one")
        seen.add(key)
        _set(result, key, _parse(text, f"override {override!r}"))
    return result


def dump_mapping(mapping: Mapping[str, Any]) -> str:
    """Write YAML that `parse_mapping` reads back to an equal mapping; keys keep their order."""
    # Escaped to ASCII: PyYAML writes a raw U+0085, but reads it back as a line break.
    return yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=False)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ValueError(f"{place}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not YAML: {error}") from error


def _set(mapping: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    here = mapping
    for depth, section in enumerate(sections, start=1):
        below = here.get(section)
        if below is not None and not isinstance(below, dict):
            raise ValueError(f"override {key}: {'.'.join(sections[:depth])} is {below!r}, not a section")
        here[section] = dict(below or {})
        here = here[section]
    here[leaf] = value
