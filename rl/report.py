"""Shows what a run did: `report.html`, one page that needs nothing else, and the table that closes `lockstep train`.

Prompts, completions and data are hostile: the page is made by a template that escapes every value, it holds no
script, and its content security policy forbids any.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from rich.table import Table
from rich.text import Text

from rl.monitor import METRICS_FILE, Record, read_metrics, replace_text
from rl.report_charts import MISMATCH_COUNTS, build_charts, mean_score, mismatch_totals
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
    page = _template().render(
        name=(yaml.safe_load(recipe_text) or {}).get("name", run_dir.resolve().name),
        recipe=recipe_text,
        summary=summary,
        status=summary.get("status", "unfinished"),
        steps=summary.get("steps", records[-1]["step"] if records else 0),
        evaluation=_evaluation_rows(summary),
        families=_family_rows(summary),
        mismatch=_mismatch(summary, records),
        charts=build_charts(records, summary.get("evaluation") or {}),
        groups=read_groups(run_dir),
    )
    path = run_dir / REPORT_FILE
    # A completion may hold half of a surrogate pair, which has no UTF-8: it is shown as \ud83d.
    replace_text(path, page.encode("utf-8", "backslashreplace").decode("utf-8"))
    return path


def summary_table(run_dir: Path, summary: Mapping[str, Any]) -> Table:
    """The table that closes a run: the result before and after, the mismatch, the digest, the time, the paths."""
    table = Table(title=f"run {summary.get('status', 'unfinished')}", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _summary_rows(run_dir, summary):
        # Text, because a digest, path or name with [brackets] would be read as rich markup.
        table.add_row(label, Text(value))
    return table


def _summary_rows(run_dir: Path, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    stages = _evaluation_rows(summary)
    rows = [(f"{name}, {stage}", _score_line(evaluation)) for stage, name, evaluation in stages]
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
        rows.append(("time", ", ".join(f"{_label(name)} {duration(value)}" for name, value in durations.items())))
    paths = {"policy": "policy", "checkpoints": "checkpoints", "rollouts": "rollouts"}
    paths |= {"metrics": METRICS_FILE, "tensorboard": "tensorboard", "report": REPORT_FILE}
    return rows + [(label, str(run_dir / name)) for label, name in paths.items() if (run_dir / name).exists()]


def _score_line(evaluation: Mapping[str, Any]) -> str:
    score = mean_score(evaluation)
    assert score is not None, "only evaluations with a score are listed"
    parts = [number(score[1])]
    if interval := evaluation.get("ci95"):
        parts.append(f"(95% interval {number(interval[0])} to {number(interval[1])})")
    parts += [f"{name} {number(value)}" for name, value in evaluation.items() if name.startswith("pass@")]
    return " ".join(parts)


def number(value: float | None, spec: str = ".3f") -> str:
    """A number as shown; a dash where there is none."""
    return "-" if value is None else format(value, spec)


def duration(seconds: float) -> str:
    """A time as people say it: 2.9 s, 2 min 31 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _label(name: str) -> str:
    return name.replace("_", " ")


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
    return [(stage, score[0], found) for stage, found in stages if found and (score := mean_score(found))]


def _family_rows(summary: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """(family, score before, score after) for each family of problems."""
    evaluations = summary.get("evaluation") or {}
    before, after = ((evaluations.get(stage) or {}).get("by_family") or {} for stage in ("before", "after"))
    return [(family, before.get(family), after.get(family)) for family in {**before, **after}]


def _mismatch(summary: Mapping[str, Any], records: list[Record]) -> dict[str, float]:
    """The counts of the whole run, or of the steps so far; empty when nothing was compared."""
    totals = summary.get("mismatch") or mismatch_totals(records)
    return {name: totals.get(name, 0) for name in MISMATCH_COUNTS} if totals.get("tokens_compared") else {}


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, duration=duration, label=_label)
    return environment.get_template("report_template.html")
