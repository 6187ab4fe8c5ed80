"""Which charts the report shows, and the metrics each one reads."""

import re
from collections.abc import Mapping
from typing import Any

from rl.eval_scores import average_name
from rl.monitor import Record, evaluation_metric
from rl.report_svg import Chart, Point, Series

STAGES = ("rollout", "reward", "train", "sync", "check")
MISMATCH_COUNTS = ("tokens_compared", "tokens_unequal", "full_vocab_rows", "full_vocab_unequal")


def build_charts(records: list[Record], evaluation: dict[str, Any]) -> list[Chart]:
    """The charts that have something to show.

    Args:
        records: the metrics by step; a metric may be missing, or None, at any step.
        evaluation: the evaluations "before" and "after" training, as in `summary.json`.
    """
    charts = [
        _reward_chart(records, evaluation),
        _chart(records, "Reward by component", "mean, before weighting", _components(records)),
        _chart(records, "Completion length", "tokens", {"mean": "length/mean", "longest": "length/max"}),
        _unequal_chart(records),
        _chart(records, "Largest log-prob difference", "nats", {"largest": "mismatch/log_prob_diff_max"}),
        _stage_chart(records),
        _chart(
            records,
            "Throughput",
            "tokens/s",
            {"rollout": "rollout/tokens_per_second", "trainer": "trainer/tokens_per_second"},
        ),
        _chart(records, "Entropy", "nats", {"entropy": "policy/entropy"}),
        _chart(records, "Gradient norm", "before clipping", {"norm": "policy/grad_norm"}),
        _chart(
            records,
            "No answer, cut off, or no reward",
            "of the completions",
            {
                "no answer": "reward/no_answer_fraction",
                "cut off": "length/truncated_fraction",
                "no reward": "reward/failure_fraction",
            },
        ),
    ]
    return [chart for chart in charts if chart.series]


def mismatch_totals(records: list[Record]) -> dict[str, float]:
    """The counts under `mismatch/`, summed over the steps, by the names `summary.json` uses."""
    return {name: sum(record.get(f"mismatch/{name}") or 0 for record in records) for name in MISMATCH_COUNTS}


def _chart(records: list[Record], title: str, unit: str, metrics: dict[str, str], note: str = "") -> Chart:
    return Chart(title, unit, _series(records, metrics), note=note)


def _series(records: list[Record], metrics: dict[str, str]) -> list[Series]:
    """A series for each label whose metric has a value at some step."""
    series = [
        Series(label, [(_step(record), record.get(name)) for record in records]) for label, name in metrics.items()
    ]
    return [one for one in series if one.last is not None]


def _components(records: list[Record]) -> dict[str, str]:
    """The metrics of what is rewarded besides a correct answer, by component: `format` at `reward/format_mean`."""
    names = dict.fromkeys(name for record in records for name in record if re.fullmatch("reward/[a-z]+_mean", name))
    return {name.removeprefix("reward/").removesuffix("_mean"): name for name in names}


def _reward_chart(records: list[Record], evaluation: dict[str, Any]) -> Chart:
    correct = {"correct": "reward/correct_fraction"} if _components(records) else {}
    series = _series(records, {"reward": "reward/mean", **correct})
    points = _evaluation_points(records, evaluation)
    if points:
        series.append(Series("evaluation", points))
    return Chart("Reward and evaluation", "mean score", series, sparse=frozenset({"evaluation"}))


def _evaluation_points(records: list[Record], evaluation: dict[str, Any]) -> list[Point]:
    """The scores by step: before training stands at step 0, after training at the last step."""
    scores: dict[float, float | None] = {}
    if before := average_score(evaluation.get("before")):
        scores[0.0] = before[1]
    for record in records:
        if name := evaluation_metric(record):
            scores[_step(record)] = record[name]
    if records and (after := average_score(evaluation.get("after"))):
        scores[_step(records[-1])] = after[1]
    return sorted(scores.items(), key=lambda point: point[0])


def average_score(evaluation: Mapping[str, Any] | None) -> tuple[str, float] | None:
    """The evaluation's ("avg@8", score), for 8 samples a problem; None without one."""
    name = average_name(evaluation or {})
    return (name, evaluation[name]) if evaluation and name else None


def _unequal_chart(records: list[Record]) -> Chart:
    totals = mismatch_totals(records)
    note = f"{totals['tokens_unequal']:,.0f} of {totals['tokens_compared']:,.0f} tokens over {len(records):,} steps"
    return _chart(records, "Tokens unequal", "tokens a step", {"unequal": "mismatch/tokens_unequal"}, note)


def _stage_chart(records: list[Record]) -> Chart:
    series = _series(records, {stage: f"time/{stage}" for stage in STAGES})
    return Chart("Time of a step, by stage", "seconds", series, kind="area")


def _step(record: Record) -> float:
    step = record["step"]
    assert step is not None, "read_metrics checks the step"
    return step
