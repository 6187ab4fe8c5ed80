"""Compares two policies on the same problems: the difference of avg@k, its interval, and a paired test."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from rl.eval_scores import average_name, bootstrap_interval, sign_flip_p_value
from rl.eval_table import two_columns

SETTINGS = ("samples", "temperature", "top_p", "max_new_tokens")
NAMED = 5  # problems that a message names


def read_result(path: Path) -> dict[str, Any]:
    """The result that `lockstep eval --json` wrote. Raises ValueError when the file is something else."""
    try:
        result = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; `lockstep eval POLICY --data FILE --json {path}` makes one") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}; give a file that `lockstep eval --json` wrote") from None
    needed = {"rows", "problems_digest", *SETTINGS}
    if not isinstance(result, dict) or not needed <= result.keys() or average_name(result) is None:
        raise ValueError(f"{path} is no evaluation; give a file that `lockstep eval --json` wrote")
    return result


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Second against first, paired by problem. Raises ValueError unless both hold the same problems.

    The p-value is that of a two-sided sign-flip test, exact; the interval is a bootstrap over problems.
    """
    counts = _paired_counts(first, second)
    unit = math.lcm(first["samples"], second["samples"])
    differences = [
        theirs * (unit // second["samples"]) - ours * (unit // first["samples"]) for ours, theirs in counts
    ]  # in units of 1 / unit, so that they are whole and the test is exact
    shares = np.array(differences) / unit
    return {
        "problems": len(differences),
        "difference": float(shares.mean()),
        "ci95": bootstrap_interval(shares, seed=0),
        "p_value": sign_flip_p_value(differences),
        "better": sum(difference > 0 for difference in differences),
        "equal": sum(difference == 0 for difference in differences),
        "worse": sum(difference < 0 for difference in differences),
    }


def _paired_counts(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(right completions in the first, in the second) of each problem."""
    ours, theirs = _by_id(first), _by_id(second)
    if ours.keys() != theirs.keys():
        only = [f"{len(ids)} only in the {name} ({_named(ids)})" for name, ids in _only(ours, theirs) if ids]
        raise ValueError(
            f"the two evaluations are of different problems: {', '.join(only)}; evaluate both policies on one data set"
        )
    if first["problems_digest"] != second["problems_digest"]:
        changed = [id_ for id_, row in ours.items() if row["answer"] != theirs[id_]["answer"]]
        what = f"the answers of {_named(changed)} differ" if changed else "their texts differ"
        raise ValueError(
            f"the two evaluations have problems of the same ids, but {what}; evaluate both policies on one data set"
        )
    return [(row["correct"], theirs[id_]["correct"]) for id_, row in ours.items()]


def _by_id(result: Mapping[str, Any]) -> dict[str, Any]:
    rows = {row["id"]: row for row in result["rows"]}
    if len(rows) < len(result["rows"]):
        raise ValueError("an evaluation has two problems of one id and cannot be paired; give every row its own id")
    return rows


def _only(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [("first", [*(ours.keys() - theirs.keys())]), ("second", [*(theirs.keys() - ours.keys())])]


def _named(ids: list[str]) -> str:
    shown = sorted(ids)
    return ", ".join(shown[:NAMED]) + (", ..." if len(shown) > NAMED else "")


def comparison_table(paths: tuple[Path, Path]) -> Table:
    """The comparison as `lockstep compare-eval` prints it. Raises ValueError as `read_result` and `compare` do."""
    results = [read_result(path) for path in paths]
    found = compare(*results)
    low, high = found["ci95"]
    labels = zip(("first", "second"), results, paths, strict=True)
    scores = {label: f"{_score(result)} ({path})" for label, result, path in labels}
    changed = {
        f"differs: {key}": f"{results[0][key]} in the first, {results[1][key]} in the second"
        for key in SETTINGS
        if results[0][key] != results[1][key]
    }
    lines = {
        "difference": f"{found['difference']:+.4f} (95% interval {low:+.4f} to {high:+.4f})",
        "p-value": f"{found['p_value']:.2g} (paired sign-flip test, two-sided, exact)",
        "second is": f"better on {found['better']}, equal on {found['equal']}, worse on {found['worse']} problems",
    }
    return two_columns(f"second against first on {found['problems']} problems", {**scores, **lines, **changed})


def _score(result: Mapping[str, Any]) -> str:
    name = average_name(result)
    assert name is not None, "read_result takes evaluations only"
    return f"{name} {result[name]:.4f}"
