"""Shows what a run did: `report.html`, one page that needs nothing else, and the table that closes `lockstep train`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from rl.eval_scores import score_names
from rl.eval_table import evaluation_lines, two_columns
from rl.monitor import METRICS_FILE, Record, read_metrics
from rl.page import duration, label, number, write_page
from rl.report_charts import MISMATCH_COUNTS, average_score, build_charts, mismatch_totals
from rl.report_rollouts import read_groups

REPORT_FILE = "report.html"


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the run folder and returns its path; a run still under way is shown as far as it got.

    Reads `recipe.yaml`, and where present `summary.json`, `metrics.jsonl` and `rollouts/`. Raises `ValueError` when
    the folder is not a run folder or one of these files is damaged.
    """
    recipe_path = run_dir / "recipe.yaml"
    if not recipe_path.is_file():
        raise ValueError(f"{run_dir} has no recipe.yaml, which every run folder has; give the folder that the run made")
    recipe_text = recipe_path.read_text(encoding="utf-8")
    records, summary = read_metrics(run_dir), _read_summary(run_dir)
    path = run_dir / REPORT_FILE
    write_page(
        path,
        "report_template.html",
        name=(yaml.safe_load(recipe_text) or {}).get("name", run_dir.resolve().name),
        recipe=recipe_text,
        summary=summary,
        status=summary.get("status", "unfinished"),
        steps=summary.get("steps", records[-1]["step"] if records else 0),
        evaluation=_evaluation_rows(summary),
        evaluation_lines=_evaluation_lines(summary),
        families=_family_rows(summary),
        mismatch=_mismatch(summary, records),
        charts=build_charts(records, summary.get("evaluation") or {}),
        groups=read_groups(run_dir),
    )
    return path


def summary_table(run_dir: Path, summary: Mapping[str, Any]) -> Table:
    """The table that closes a run: the result before and after, the mismatch, the digest, the time, the paths."""
    return two_columns(f"run {summary.get('status', 'unfinished')}", dict(_summary_rows(run_dir, summary)))


def _summary_rows(run_dir: Path, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    stages = _evaluation_rows(summary)
    rows = [(f"{name}, {stage}", _score_line(evaluation)) for stage, name, evaluation in stages]
    if regime := summary.get("regime"):
        rows.append(("regime", regime))
    if mismatch := _mismatch(summary, []):
        rows.append(("mismatch", f"{mismatch['tokens_unequal']:,.0f} of {mismatch['tokens_compared']:,.0f} tokens"))
        rows.append(
            (
                "mismatch, whole vocabulary",
                f"{mismatch['full_vocab_unequal']:,.0f} of {mismatch['full_vocab_rows']:,.0f} rows",
            )
        )
    if digest := summary.get("weights_digest"):
        rows.append(("weights digest", digest))
    if durations := summary.get("durations"):
        rows.append(("time", ", ".join(f"{label(name)} {duration(value)}" for name, value in durations.items())))
    paths = {"policy": "policy", "checkpoints": "checkpoints", "rollouts": "rollouts"}
    paths |= {"metrics": METRICS_FILE, "tensorboard": "tensorboard", "report": REPORT_FILE}
    return rows + [(what, str(run_dir / name)) for what, name in paths.items() if (run_dir / name).exists()]


def _score_line(evaluation: Mapping[str, Any]) -> str:
    average, *others = score_names(evaluation)
    low, high = evaluation["ci95"][average]
    parts = [f"{number(evaluation[average])} (95% interval {number(low)} to {number(high)})"]
    parts += [f"{name} {number(evaluation[name])}" for name in others]
    return " ".join(parts)


def _read_summary(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "summary.json"
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON object: {error}; remove it to report without it") from error
    assert isinstance(summary, dict), "summary.json is written by the run, as an object"
    return summary


def _evaluation_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """("before" or "after", name of the score, evaluation) for each evaluation done."""
    evaluations = summary.get("evaluation") or {}
    stages = [(stage, evaluations.get(stage)) for stage in ("before", "after")]
    return [(stage, score[0], found) for stage, found in stages if found and (score := average_score(found))]


def _evaluation_lines(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(label, what is said of each evaluation done) for each line of the table of evaluations."""
    stages = [evaluation_lines(found) for _, _, found in _evaluation_rows(summary)]
    labels = {name: None for lines in stages for name in lines}
    return [(name, [lines.get(name, "-") for lines in stages]) for name in labels]


def _family_rows(summary: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """(family, score before, score after) for each family of problems."""
    evaluations = summary.get("evaluation") or {}
    before, after = ((evaluations.get(stage) or {}).get("by_family") or {} for stage in ("before", "after"))
    return [(family, before.get(family), after.get(family)) for family in {**before, **after}]


def _mismatch(summary: Mapping[str, Any], records: list[Record]) -> dict[str, float]:
    """The counts of the whole run, or of the steps so far; empty when nothing was compared."""
    totals = summary.get("mismatch") or mismatch_totals(records)
    return {name: totals.get(name, 0) for name in MISMATCH_COUNTS} if totals.get("tokens_compared") else {}
