"""The table that closes a run, and the headline of its report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from rl.eval_scores import score_names
from rl.eval_table import evaluation_lines, two_columns
from rl.monitor import METRICS_FILE, Record
from rl.page import duration, label, number
from rl.report.charts import MISMATCH_COUNTS, average_score, mismatch_totals

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Verdict:
    """Whether trainer and sampler agreed. counts: as `MISMATCH_COUNTS`; further: what else a reader should know."""

    title: str
    holds: bool
    counts: dict[str, float]
    further: str


def verdict(summary: Mapping[str, Any], records: Sequence[Record]) -> Verdict | None:
    """Of the whole run, or of the steps so far; None where nothing was compared."""
    counts = mismatch_counts(summary, records)
    if not counts:
        return None
    regime = str(summary.get("regime", ""))
    equal = not counts["tokens_unequal"] and not counts["full_vocab_unequal"]
    if equal:
        title = "equal in every bit, though not promised" if regime.startswith("not") else "aligned"
        return Verdict(title, True, counts, "")
    largest = max((record.get("mismatch/log_prob_diff_max") or 0.0 for record in records), default=0.0)
    title = "not aligned, as its recipe says" if regime.startswith("not") else "not aligned"
    return Verdict(title, False, counts, f"largest difference of log-probs {largest:.3g}")


def summary_table(run_dir: Path, summary: Mapping[str, Any]) -> Table:
    """The table that closes a run: the result before and after, the mismatch, the digest, the time, the paths."""
    return two_columns(f"run {summary.get('status', 'unfinished')}", dict(_summary_rows(run_dir, summary)))


def read_summary(run_dir: Path) -> dict[str, Any]:
    """`summary.json`, empty where a run has none yet. Raises ValueError when it is damaged."""
    path = run_dir / "summary.json"
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON object: {error}; remove it to report without it") from error
    assert isinstance(summary, dict), "summary.json is written by the run, as an object"
    return summary


def evaluation_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """("before" or "after", name of the score, evaluation) for each evaluation done."""
    evaluations = summary.get("evaluation") or {}
    stages = [(stage, evaluations.get(stage)) for stage in ("before", "after")]
    return [(stage, score[0], found) for stage, found in stages if found and (score := average_score(found))]


def compared_lines(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(label, what is said of each evaluation done) for each line of the table of evaluations."""
    stages = [evaluation_lines(found) for _, _, found in evaluation_rows(summary)]
    labels = {name: None for lines in stages for name in lines}
    return [(name, [lines.get(name, "-") for lines in stages]) for name in labels]


def family_rows(summary: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """(family, score before, score after) for each family of problems."""
    evaluations = summary.get("evaluation") or {}
    before, after = ((evaluations.get(stage) or {}).get("by_family") or {} for stage in ("before", "after"))
    return [(family, before.get(family), after.get(family)) for family in {**before, **after}]


def mismatch_counts(summary: Mapping[str, Any], records: Sequence[Record]) -> dict[str, float]:
    """The counts of the whole run, or of the steps so far; empty when nothing was compared."""
    totals = summary.get("mismatch") or mismatch_totals(records)
    return {name: totals.get(name, 0) for name in MISMATCH_COUNTS} if totals.get("tokens_compared") else {}


def _summary_rows(run_dir: Path, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    stages = evaluation_rows(summary)
    rows = [(f"{name}, {stage}", _score_line(evaluation)) for stage, name, evaluation in stages]
    if regime := summary.get("regime"):
        rows.append(("regime", regime))
    if mismatch := mismatch_counts(summary, []):
        rows.append(("mismatch", f"{mismatch['tokens_unequal']:,.0f} of {mismatch['tokens_compared']:,.0f} tokens"))
        full_vocab = f"{mismatch['full_vocab_unequal']:,.0f} of {mismatch['full_vocab_rows']:,.0f} rows"
        rows.append(("mismatch, whole vocabulary", full_vocab))
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
