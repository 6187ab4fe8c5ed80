"""`lockstep compare`: what several runs did, side by side: recipes, scores, mismatch, speeds, weights."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from rl.eval_compare import compare, read_result
from rl.monitor import Record, evaluation_metric, read_metrics
from rl.page import duration, write_page
from rl.recipe_yaml import parse_mapping
from rl.report.charts import average_score
from rl.report.recipe_changes import ABSENT, flat
from rl.report.summary import mismatch_counts, read_summary
from rl.report.svg import Chart, Point, Series

MAX_RUNS = 8  # as many as the page has colours
# Title, unit and metric of each chart; a chart that no run has values for is left out.
CURVES = (
    ("Reward", "mean score", "reward/mean"),
    ("Tokens unequal", "tokens a step", "mismatch/tokens_unequal"),
    ("Largest log-prob difference", "nats", "mismatch/log_prob_diff_max"),
    ("k3", "estimate of KL(sampler || trainer), nats", "mismatch/k3"),
    ("Entropy", "nats", "policy/entropy"),
    ("Gradient norm", "before clipping", "policy/grad_norm"),
    ("Completion length", "mean, tokens", "length/mean"),
    ("Time of a step", "s", "time/step"),
)
DETAILS = ("Largest log-prob difference", "k3")  # say nothing new where no token is unequal


@dataclass(frozen=True)
class ComparedRun:
    """What a run folder says, under a name that no other run of the comparison has."""

    name: str
    path: Path
    recipe: Mapping[str, Any]
    summary: Mapping[str, Any]
    records: Sequence[Record]

    @cached_property
    def final_evaluation(self) -> dict[str, Any] | None:
        """The newest evaluation in its folder, with the rows of its problems."""
        files = sorted((self.path / "evaluation").glob("step_*.json"))
        return read_result(files[-1]) if files else None

    def median(self, metric: str) -> float | None:
        values = [value for record in self.records if (value := record.get(metric)) is not None]
        return median(values) if values else None


@dataclass(frozen=True)
class Comparison:
    """rows: (what, its value for each run). recipe: (key, its value for each run) where the recipes differ. notes:
    what could not be compared, and why."""

    runs: Sequence[ComparedRun]
    rows: list[tuple[str, list[str]]]
    recipe: list[tuple[str, list[str]]]
    notes: list[str]
    same_weights: str


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Raises ValueError when one is no run folder or is damaged, or when there are too few or too many."""
    if not 2 <= len(paths) <= MAX_RUNS:
        raise ValueError(f"{len(paths)} runs given; a comparison is of 2 to {MAX_RUNS}")
    return [_read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def compare_runs(runs: Sequence[ComparedRun]) -> Comparison:
    """All of them, the later ones against the first where a test is of two."""
    rows = [(label, [value(run) for run in runs]) for label, value in _VALUES.items()]
    tests, notes = _against_first(runs)
    shown = [row for row in [*rows, *tests] if any(value != ABSENT for value in row[1])]
    return Comparison(runs, shown, _recipe_differences(runs), notes, _same_weights(runs))


def comparison_tables(found: Comparison) -> list[Table]:
    """Of the runs, and of their recipes where they differ."""
    names = [run.name for run in found.runs]
    tables = [_table("runs", names, found.rows)]
    return tables + ([_table("recipes, where they differ", names, found.recipe)] if found.recipe else [])


def write_comparison(path: Path, found: Comparison) -> None:
    """One HTML page that needs nothing else."""
    write_page(path, "compare_template.html", found=found, charts=comparison_charts(found.runs))


def comparison_charts(runs: Sequence[ComparedRun]) -> list[Chart]:
    """A line for each run, always in the same colour."""
    charts = [_chart(runs, title, unit, metric) for title, unit, metric in CURVES]
    evaluation = Chart(
        "Evaluation",
        "mean score",
        [series for series in (_evaluations(run, place) for place, run in enumerate(runs)) if series.points],
        sparse=frozenset(run.name for run in runs),
    )
    return [
        chart
        for chart in [charts[0], evaluation, *charts[1:]]
        if chart.series
        and (chart.title not in DETAILS or any(value for one in chart.series for _, value in one.points))
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, or as much of their paths as tells them apart."""
    resolved = [path.resolve() for path in paths]
    for parts in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-parts:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{paths[0]} is given twice; compare different runs")


def _read_run(path: Path, name: str) -> ComparedRun:
    recipe = path / "recipe.yaml"
    if not recipe.is_file():
        raise ValueError(f"{path} holds no run (no recipe.yaml); give the folders of runs")
    mapping = parse_mapping(recipe.read_text(encoding="utf-8"), str(recipe))
    return ComparedRun(name, path, mapping, read_summary(path), read_metrics(path))


def _number(metric: str, spec: str) -> Callable[[ComparedRun], str]:
    def value(run: ComparedRun) -> str:
        found = run.median(metric)
        return ABSENT if found is None else format(found, spec)

    return value


def _score(stage: str) -> Callable[[ComparedRun], str]:
    def value(run: ComparedRun) -> str:
        evaluation = (run.summary.get("evaluation") or {}).get(stage)
        score = average_score(evaluation)
        if not evaluation or not score:
            return ABSENT
        low, high = evaluation["ci95"][score[0]]
        return f"{score[0]} {score[1]:.4f} ({low:.4f} to {high:.4f})"

    return value


def _mismatch(run: ComparedRun) -> str:
    counts = mismatch_counts(run.summary, run.records)
    return f"{counts['tokens_unequal']:,.0f} of {counts['tokens_compared']:,.0f} tokens" if counts else ABSENT


def _time(run: ComparedRun) -> str:
    total = (run.summary.get("durations") or {}).get("total")
    return ABSENT if total is None else duration(total)


_VALUES: dict[str, Callable[[ComparedRun], str]] = {
    "status": lambda run: str(run.summary.get("status", "unfinished")),
    "steps": lambda run: f"{run.records[-1]['step']:,}" if run.records else "0",
    "regime": lambda run: str(run.summary.get("regime", ABSENT)),
    "before training": _score("before"),
    "after training": _score("after"),
    "mismatch": _mismatch,
    "time": _time,
    "seconds a step, median": _number("time/step", ".2f"),
    "tokens/s sampled, median": _number("rollout/tokens_per_second", ",.0f"),
    "tokens/s trained, median": _number("trainer/tokens_per_second", ",.0f"),
    "weights digest": lambda run: str(run.summary.get("weights_digest", ABSENT))[:16],
}


def _against_first(runs: Sequence[ComparedRun]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """The paired comparison of the final evaluations, and why one could not be made."""
    first, differences, p_values, notes = runs[0], [ABSENT], [ABSENT], []
    for run in runs[1:]:
        difference, p_value = ABSENT, ABSENT
        if first.final_evaluation is None or run.final_evaluation is None:
            missing = first if first.final_evaluation is None else run
            notes.append(f"{missing.name} has no evaluation, so {run.name} is not tested against {first.name}")
        else:
            try:
                found = compare(first.final_evaluation, run.final_evaluation)
            except ValueError as error:
                notes.append(f"{run.name} is not tested against {first.name}: {error}")
            else:
                low, high = found["ci95"]
                difference = f"{found['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
                p_value = f"{found['p_value']:.2g}"
        differences.append(difference)
        p_values.append(p_value)
    return [("last evaluation against the first run's", differences), ("p-value, paired, exact", p_values)], notes


def _recipe_differences(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    values = [flat(run.recipe) for run in runs]
    keys = dict.fromkeys(itertools.chain.from_iterable(values))
    rows = [(key, [json.dumps(each[key], default=str) if key in each else ABSENT for each in values]) for key in keys]
    return [(key, shown) for key, shown in rows if len(set(shown)) > 1]


def _same_weights(runs: Sequence[ComparedRun]) -> str:
    """Which runs ended in the same weights, in words."""
    by_digest: dict[str, list[str]] = {}
    for run in runs:
        if digest := run.summary.get("weights_digest"):
            by_digest.setdefault(digest, []).append(run.name)
    groups = [names for names in by_digest.values() if len(names) > 1]
    if not groups:
        return "no two of them ended in the same weights"
    return "; ".join(f"{' and '.join(names)} ended in the same weights, bit for bit" for names in groups)


def _table(title: str, names: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column()
    for name in names:
        table.add_column(Text(name), overflow="fold")
    for label, values in rows:
        table.add_row(Text(label, style="bold"), *map(Text, values))
    return table


def _chart(runs: Sequence[ComparedRun], title: str, unit: str, metric: str) -> Chart:
    lines = [
        Series(run.name, [(float(record["step"] or 0), record.get(metric)) for record in run.records], place)
        for place, run in enumerate(runs)
    ]
    return Chart(title, unit, [line for line in lines if line.last is not None])


def _evaluations(run: ComparedRun, place: int) -> Series:
    points: list[Point] = []
    evaluation = run.summary.get("evaluation") or {}
    if before := average_score(evaluation.get("before")):
        points.append((0.0, before[1]))
    for record in run.records:
        if name := evaluation_metric(record):
            points.append((float(record["step"] or 0), record[name]))
    if run.records and (after := average_score(evaluation.get("after"))):
        points.append((float(run.records[-1]["step"] or 0), after[1]))
    return Series(run.name, points, place)
