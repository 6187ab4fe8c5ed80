"""Writes `report.html`, one page that needs nothing else, from what a run folder holds."""

from pathlib import Path
from statistics import median
from typing import Any

from rl.alignment_cost import shown_costs
from rl.events import read_events
from rl.monitor import Record, read_metrics
from rl.page import script_data, write_page
from rl.recipe_yaml import parse_mapping
from rl.report.charts import ChartData, build_sections
from rl.report.recipe_changes import base_recipe, recipe_changes
from rl.report.rollouts import read_rollouts
from rl.report.summary import REPORT_FILE, compared_lines, evaluation_rows, family_rows, read_summary, verdict

MAX_EVENTS = 200


def write_report(run_dir: Path, base: Path | None = None) -> Path:
    """Writes `report.html` into the run folder and returns its path; a run still under way is shown as far as it got.

    Reads `recipe.yaml`, and where present `summary.json`, `metrics.jsonl`, `events.jsonl`, `rollouts/` and what
    `lockstep bench alignment` measured. The recipe is shown against that of `base`, a recipe file or a run folder; None
    is the defaults. Raises `ValueError` when the folder is not a run folder, or one of these files is damaged.
    """
    recipe_path = run_dir / "recipe.yaml"
    if not recipe_path.is_file():
        raise ValueError(f"{run_dir} has no recipe.yaml, which every run folder has; give the folder that the run made")
    recipe_text = recipe_path.read_text(encoding="utf-8")
    recipe = parse_mapping(recipe_text, str(recipe_path))
    records, summary, events = read_metrics(run_dir), read_summary(run_dir), read_events(run_dir)
    rollouts, (base_name, base_values) = read_rollouts(run_dir, records), base_recipe(base)
    data = ChartData(
        records=records,
        evaluation=summary.get("evaluation") or {},
        probabilities=rollouts.probabilities(),
        events=sorted({float(event.step) for event in events}),
        asynchronous=bool((recipe.get("loop") or {}).get("max_staleness")),
    )
    path = run_dir / REPORT_FILE
    write_page(
        path,
        "report/template.html",
        styles=["report/report.css"],
        scripts=["report/report.js"],
        name=recipe.get("name", run_dir.resolve().name),
        recipe=recipe_text,
        changes=recipe_changes(recipe, base_values),
        base=base_name,
        summary=summary,
        status=summary.get("status", "unfinished"),
        steps=summary.get("steps", records[-1]["step"] if records else 0),
        evaluation=evaluation_rows(summary),
        evaluation_lines=compared_lines(summary),
        families=family_rows(summary),
        verdict=verdict(summary, records),
        speeds=_medians(records),
        sections=build_sections(data),
        alignment_cost=shown_costs(run_dir),
        events=events[-MAX_EVENTS:],
        event_count=len(events),
        rollouts=rollouts,
        rollout_data=script_data(rollouts.groups),
    )
    return path


def _medians(records: list[Record]) -> dict[str, Any]:
    """Over the steps that have them: seconds of a step, tokens per second of rollout and trainer."""
    names = {
        "step": "time/step",
        "rollout": "rollout/tokens_per_second",
        "trainer": "trainer/tokens_per_second",
    }
    found = {label: [record[name] for record in records if record.get(name)] for label, name in names.items()}
    return {label: median(float(value or 0) for value in values) for label, values in found.items() if values}
