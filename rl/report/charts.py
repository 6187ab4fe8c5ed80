"""Which charts the report shows, in which section, and the metrics each one reads."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rl.eval_scores import average_name
from rl.monitor import Record, evaluation_metric
from rl.report.figures import Bars, Figure, Scatter
from rl.report.svg import Chart, Point, Series
from rl.report.timeline import sampling_chart, stage_chart, step_gantt, step_of

MISMATCH_COUNTS = ("tokens_compared", "tokens_unequal", "full_vocab_rows", "full_vocab_unequal")
MAX_LAYERS = 5  # with more, the lines are the lowest and the mean of all layers


@dataclass(frozen=True)
class Section:
    """A heading with its charts. zero: titles of those left out because every value is 0."""

    title: str
    figures: list[Chart | Figure]
    zero: list[str]


@dataclass(frozen=True)
class ChartData:
    """What the charts are drawn from.

    records: the metrics by step; a metric may be missing, or None, at any step. evaluation: "before" and "after"
    training, as in `summary.json`. probabilities: (sampler, trainer) of some tokens that were recorded. events: steps.
    """

    records: Sequence[Record]
    evaluation: Mapping[str, Any]
    probabilities: Sequence[tuple[float, float]] = ()
    events: Sequence[float] = ()
    asynchronous: bool = False


def build_sections(data: ChartData) -> list[Section]:
    """The sections and charts that have something to show."""
    makers = {
        "Learning": _learning,
        "Mismatch of trainer and sampler": _mismatch,
        "Completions": _completions,
        "Time and memory": _resources,
    }
    return [section for title, make in makers.items() if (section := _section(title, make, data)).figures]


def mismatch_totals(records: Sequence[Record]) -> dict[str, float]:
    """The counts under `mismatch/`, summed over the steps, by the names `summary.json` uses."""
    return {name: sum(record.get(f"mismatch/{name}") or 0 for record in records) for name in MISMATCH_COUNTS}


def average_score(evaluation: Mapping[str, Any] | None) -> tuple[str, float] | None:
    """The evaluation's ("avg@8", score), for 8 samples a problem; None without one."""
    name = average_name(evaluation or {})
    return (name, evaluation[name]) if evaluation and name else None


def _section(title: str, make: Callable[[ChartData], list[Chart | Figure]], data: ChartData) -> Section:
    figures = [figure for figure in make(data) if not isinstance(figure, Chart) or figure.series]
    zero = [figure.title for figure in figures if _is_detail_of_zero(figure)]
    marked = [_marked(figure, data.events) for figure in figures if figure.title not in zero]
    return Section(title, marked, zero)


def _marked(figure: Chart | Figure, events: Sequence[float]) -> Chart | Figure:
    if not isinstance(figure, Chart):
        return figure
    steps = [step for one in figure.series for step, _ in one.points]
    return replace(figure, marks=tuple(step for step in events if min(steps) <= step <= max(steps)))


def _is_detail_of_zero(figure: Chart | Figure) -> bool:
    """Whether a chart says nothing but that trainer and sampler agree, which a chart before it has said."""
    if not isinstance(figure, Chart) or figure.title not in MISMATCH_DETAILS:
        return False
    return not any(value for one in figure.series for _, value in one.points)


def _learning(data: ChartData) -> list[Chart | Figure]:
    records = data.records
    return [
        _reward_chart(data),
        _chart(records, "Reward by component", "mean, before weighting", _components(records)),
        _chart(records, "Entropy", "nats", {"entropy": "policy/entropy"}),
        _chart(records, "Gradient norm", "before clipping", {"norm": "policy/grad_norm"}),
        _chart(records, "Clipped tokens", "share of all", {"clipped": "policy/clip_fraction"}),
        _chart(records, "Groups without signal", "groups a step", {"groups": "policy/groups_without_signal"}),
    ]


MISMATCH_DETAILS = {
    "Log-prob difference": {
        "mean of |d|": "mismatch/log_prob_diff_abs_mean",
        "90%": "mismatch/log_prob_diff_p90",
        "99%": "mismatch/log_prob_diff_p99",
    },
    "Divergence": {"k1": "mismatch/k1", "k2": "mismatch/k2", "k3": "mismatch/k3"},
    "Chi-square": {"tokens": "mismatch/chi2_token", "sequences": "mismatch/chi2_seq"},
    "Ratio outside": {
        "0.99 to 1.01": "mismatch/outside_1_percent",
        "0.95 to 1.05": "mismatch/outside_5_percent",
        "0.5 to 2": "mismatch/outside_half_to_2",
        "0.5 to 5": "mismatch/outside_half_to_5",
    },
    "Numeric and staleness parts": {
        "numeric": "mismatch_numeric/log_prob_diff_abs_mean",
        "staleness": "mismatch_staleness/log_prob_diff_abs_mean",
    },
    "Staleness": {"mean": "staleness/mean", "largest": "staleness/max"},
}
_UNITS = {
    "Log-prob difference": "nats, trainer - sampler",
    "Divergence": "estimates of KL(sampler || trainer), nats",
    "Chi-square": "of the ratio",
    "Ratio outside": "share of tokens",
    "Numeric and staleness parts": "mean of |d|, nats",
    "Staleness": "policy versions",
}


def _mismatch(data: ChartData) -> list[Chart | Figure]:
    records = data.records
    figures: list[Chart | Figure] = [
        _unequal_chart(records),
        _chart(records, "Largest log-prob difference", "nats", {"largest": "mismatch/log_prob_diff_max"}),
        *(_chart(records, title, _UNITS[title], metrics) for title, metrics in MISMATCH_DETAILS.items()),
        *_bars(records, "mismatch/position/", "Mismatch by position", "mean of |d|, nats, by place in the completion"),
        *_bars(records, "mismatch/length/", "Mismatch by length", "|mean of d| of a completion, nats, by its tokens"),
    ]
    if data.probabilities:
        note = f"{len(data.probabilities):,} of the tokens in the rollouts below"
        figures.append(
            Scatter("Probability of sampled tokens", "", data.probabilities, "in the sampler", "in the trainer", note)
        )
    return figures + _expert_figures(records)


def _completions(data: ChartData) -> list[Chart | Figure]:
    fractions = {
        "no answer": "reward/no_answer_fraction",
        "cut off": "length/truncated_fraction",
        "no reward": "reward/failure_fraction",
    }
    return [
        _chart(data.records, "Completion length", "tokens", {"mean": "length/mean", "longest": "length/max"}),
        _chart(data.records, "No answer, cut off, or no reward", "of the completions", fractions),
    ]


def _resources(data: ChartData) -> list[Chart | Figure]:
    records = data.records
    speeds = {"rollout": "rollout/tokens_per_second", "trainer": "trainer/tokens_per_second"}
    names = sorted({name for record in records for name in record if name.startswith("memory/")})
    memory = {name.removeprefix("memory/").removesuffix("_mb"): name for name in names}
    gantt = step_gantt(records, data.asynchronous)
    return [
        stage_chart(records, data.asynchronous),
        *([gantt] if gantt else []),
        sampling_chart(records, data.asynchronous),
        _chart(records, "Throughput", "tokens/s", speeds),
        _chart(records, "Memory", "MiB, most that a process has held so far", memory),
    ]


def _chart(records: Sequence[Record], title: str, unit: str, metrics: Mapping[str, str], note: str = "") -> Chart:
    return Chart(title, unit, _series(records, metrics), note=note)


def _series(records: Sequence[Record], metrics: Mapping[str, str]) -> list[Series]:
    """A series for each label whose metric has a value at some step."""
    series = [
        Series(label, [(step_of(record), record.get(name)) for record in records]) for label, name in metrics.items()
    ]
    return [one for one in series if one.last is not None]


def _components(records: Sequence[Record]) -> dict[str, str]:
    """The metrics of what is rewarded besides a correct answer, by component: `format` at `reward/format_mean`."""
    names = dict.fromkeys(name for record in records for name in record if re.fullmatch("reward/[a-z]+_mean", name))
    return {name.removeprefix("reward/").removesuffix("_mean"): name for name in names}


def _reward_chart(data: ChartData) -> Chart:
    correct = {"correct": "reward/correct_fraction"} if _components(data.records) else {}
    series = _series(data.records, {"reward": "reward/mean", **correct})
    points = _evaluation_points(data.records, data.evaluation)
    if points:
        series.append(Series("evaluation", points))
    return Chart("Reward and evaluation", "mean score", series, sparse=frozenset({"evaluation"}))


def _evaluation_points(records: Sequence[Record], evaluation: Mapping[str, Any]) -> list[Point]:
    """The scores by step: before training stands at step 0, after training at the last step."""
    scores: dict[float, float | None] = {}
    if before := average_score(evaluation.get("before")):
        scores[0.0] = before[1]
    for record in records:
        if name := evaluation_metric(record):
            scores[step_of(record)] = record[name]
    if records and (after := average_score(evaluation.get("after"))):
        scores[step_of(records[-1])] = after[1]
    return sorted(scores.items(), key=lambda point: point[0])


def _unequal_chart(records: Sequence[Record]) -> Chart:
    totals = mismatch_totals(records)
    note = f"{totals['tokens_unequal']:,.0f} of {totals['tokens_compared']:,.0f} tokens over {len(records):,} steps"
    return _chart(records, "Tokens unequal", "tokens a step", {"unequal": "mismatch/tokens_unequal"}, note)


def _bars(records: Sequence[Record], prefix: str, title: str, unit: str) -> list[Bars]:
    """The mean over the steps of every metric that begins so, in the order of the first number of its name."""
    values = {name.removeprefix(prefix): mean for name, mean in _means(records, prefix).items()}
    ordered = dict(sorted(values.items(), key=lambda item: int("".join(re.findall(r"\d+", item[0])[:1]) or 0)))
    return [Bars(title, unit, ordered, note=f"mean over {len(records):,} steps")] if ordered else []


def _expert_figures(records: Sequence[Record]) -> list[Chart | Figure]:
    prefix, unit = "mismatch/expert_agreement/", "tokens sent to the same experts by both"
    layers = _means(records, prefix)
    if len(layers) <= MAX_LAYERS:
        lines = {name.removeprefix(prefix).replace("_", " "): name for name in layers}
        return [replace(_chart(records, "Expert agreement", unit, lines), from_zero=False)]
    rows = [
        (step_of(record), [value for name in layers if (value := record.get(name)) is not None]) for record in records
    ]
    lowest = Series("lowest layer", [(step, min(row, default=None)) for step, row in rows])
    mean = Series("mean", [(step, math.fsum(row) / len(row) if row else None) for step, row in rows])
    bars = {name.removeprefix(prefix).removeprefix("layer_"): value for name, value in layers.items()}
    ordered = dict(sorted(bars.items(), key=lambda item: int(item[0]) if item[0].isdigit() else 0))
    return [
        Chart("Expert agreement", unit, [lowest, mean], from_zero=False),
        Bars("Expert agreement by layer", unit, ordered, note=f"mean over {len(records):,} steps"),
    ]


def _means(records: Sequence[Record], prefix: str) -> dict[str, float]:
    """The mean over the steps that have it of every metric that begins so."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith(prefix) and value is not None:
                found.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}
