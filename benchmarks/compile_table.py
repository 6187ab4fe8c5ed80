"""The checked-in tables of what kernels are compiled to: one file for each version of Triton, one line a kernel."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.compile_inspect import DISASSEMBLED

FOLDER = Path(__file__).parent.parent / "tests" / "ops" / "kernels"

Result = dict[str, Any]  # of benchmarks.compile_worker, for one target
Table = dict[str, Any]  # name of a kernel behind that of its target, or what is said of a target -> a value


def table_path(version: str) -> Path:
    return FOLDER / f"table-{version}.json"


def to_table(results: Iterable[Result]) -> Table:
    """Of all targets compiled by one version of Triton."""
    table: Table = {}
    for result in sorted(results, key=lambda each: each["target"] != DISASSEMBLED):
        target = result["target"]
        table[f"{target} assembler"] = result["assembler"]
        table |= {f"{target} {kernel} follows rows": names for kernel, names in result["follows_rows"].items()}
        table |= {f"{target} {kernel}": row for kernel, row in result["kernels"].items()}
    return table


def read_table(path: Path) -> Table | None:
    """None when there is none."""
    if not path.is_file():
        return None
    table: Table = json.loads(path.read_text())
    return table


def write_table(path: Path, table: Table) -> None:
    lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in table.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def differences(expected: Table, found: Table) -> list[str]:
    """One line for each entry that is new, gone or another."""
    lines = [f"gone: {name}" for name in expected if name not in found]
    lines += [f"new: {name}: {_say(found[name])}" for name in found if name not in expected]
    both = [name for name in found if name in expected and found[name] != expected[name]]
    return lines + [f"changed: {name}: {_change(expected[name], found[name])}" for name in both]


def _change(before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{before!r} -> {now!r}"
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} {_words(before.get(key, 0), now.get(key, 0))}" for key in keys)


def _words(before: Any, now: Any) -> str:
    """Of two lists of words only what is not in both."""
    if not isinstance(before, str) or not isinstance(now, str):
        return f"{before} -> {now}"
    left, right = before.split(), now.split()
    lost, won = [word for word in left if word not in right], [word for word in right if word not in left]
    return f"{' '.join(lost) or '-'} -> {' '.join(won) or '-'}"


def _say(value: Any) -> str:
    return ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else repr(value)
