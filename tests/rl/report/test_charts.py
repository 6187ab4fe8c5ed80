"""Which charts a run gets, and from which of its metrics."""

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import pytest

from rl.monitor import Record
from rl.report.charts import ChartData, Section, build_sections, mismatch_totals
from rl.report.figures import Bars, Figure
from rl.report.svg import Chart
from tests.rl.report.folders import metrics


def test_every_chart_of_a_run_of_one_step_can_be_drawn() -> None:
    figures = _figures(ChartData([metrics(1)], {}))
    assert all(len(ElementTree.fromstring(figure.svg)) > 0 for figure in figures.values())
    assert list(figures) == [
        "Reward and evaluation",
        "Entropy",
        "Gradient norm",
        "Tokens unequal",
        "Largest log-prob difference",
        "Completion length",
        "Time of a step, by stage",
        "Throughput",
    ]


def test_components_have_a_chart_of_their_own_where_a_recipe_names_any() -> None:
    """Values before weighting; the mean reward then has the correct answers beside it."""
    plain = _chart([metrics(1) | {"reward/correct_fraction": 0.5}], "Reward and evaluation")
    assert [series.label for series in plain.series] == ["reward"]
    parts = {"reward/correct_fraction": 0.25, "reward/format_mean": 1.0, "reward/overlong_mean": -0.5}
    total, components = (
        _chart([metrics(1) | parts], title) for title in ("Reward and evaluation", "Reward by component")
    )
    assert [(series.label, series.last) for series in total.series] == [("reward", 0.5), ("correct", 0.25)]
    assert [(series.label, series.last) for series in components.series] == [("format", 1.0), ("overlong", -0.5)]


def test_evaluations_stand_at_their_steps() -> None:
    records: list[Record] = [
        {"step": 5, "reward/mean": 0.5},
        {"step": 10, "eval/avg@8": 0.25},
        {"step": 15, "reward/mean": 0.5},
    ]
    evaluation = {"before": {"avg@8": 0.125}, "after": {"avg@8": 0.375}}
    chart = _chart(records, "Reward and evaluation", evaluation)
    assert chart.series[1].points == [(0.0, 0.125), (10, 0.25), (15, 0.375)]


def test_mismatch_totals_sum_the_steps() -> None:
    records: list[Record] = [metrics(1), {"step": 2, "mismatch/tokens_unequal": 3, "mismatch/tokens_compared": None}]
    assert mismatch_totals(records) == {
        "tokens_compared": 100,
        "tokens_unequal": 3,
        "full_vocab_rows": 0,
        "full_vocab_unequal": 0,
    }


def test_details_of_a_mismatch_are_drawn_only_where_there_is_one() -> None:
    """A chart that is left out is named, so that nobody looks for it."""
    zero = metrics(1) | {"mismatch/k1": 0.0, "mismatch/k2": 0.0, "mismatch/k3": 0.0}
    section = _mismatch_section([zero])
    assert section.zero == ["Divergence"]
    assert [figure.title for figure in section.figures] == ["Tokens unequal", "Largest log-prob difference"]
    section = _mismatch_section([zero | {"mismatch/k3": 1e-6}])
    assert section.zero == [] and section.figures[2].title == "Divergence"


def test_mismatch_by_position_is_the_mean_over_the_steps_in_the_order_of_places() -> None:
    records: list[Record] = [
        {"step": 1, "mismatch/position/1024-4095": 0.5, "mismatch/position/0-15": 0.25},
        {"step": 2, "mismatch/position/0-15": 0.75},
    ]
    bars = _figures(ChartData(records, {}))["Mismatch by position"]
    assert isinstance(bars, Bars) and list(bars.values.items()) == [("0-15", 0.5), ("1024-4095", 0.5)]


def test_agreement_of_many_layers_is_their_lowest_and_mean_and_a_bar_for_each() -> None:
    record: Record = {"step": 1, **{f"mismatch/expert_agreement/layer_{layer}": 1 - layer / 100 for layer in range(11)}}
    figures = _figures(ChartData([record], {}))
    bars, lines = figures["Expert agreement by layer"], figures["Expert agreement"]
    assert isinstance(bars, Bars) and list(bars.values) == [str(layer) for layer in range(11)]
    assert isinstance(lines, Chart) and [one.last for one in lines.series] == [0.9, pytest.approx(0.95)]


def test_the_scatter_tells_equal_from_different() -> None:
    scatter = _figures(ChartData([], {}, probabilities=[(0.5, 0.5), (0.25, 0.75)]))["Probability of sampled tokens"]
    drawn = {path.get("class"): path.get("d") for path in ElementTree.fromstring(scatter.svg).iter("path")}
    # The square is 210 wide, from (56, 222) upwards.
    assert (drawn["points s0"], drawn["points s1"]) == ("M161.0 117.0h0", "M108.5 64.5h0")


def test_events_are_marked_on_the_charts_whose_steps_they_fall_in() -> None:
    chart = _chart([metrics(2), metrics(4)], "Entropy", events=[1.0, 3.0, 9.0])
    assert chart.marks == (3.0,)


def _mismatch_section(records: list[Record]) -> Section:
    return next(each for each in build_sections(ChartData(records, {})) if each.title.startswith("Mismatch"))


def _figures(data: ChartData) -> dict[str, Chart | Figure]:
    return {figure.title: figure for section in build_sections(data) for figure in section.figures}


def _chart(
    records: list[Record], title: str, evaluation: dict[str, Any] | None = None, events: Sequence[float] = ()
) -> Chart:
    chart = _figures(ChartData(records, evaluation or {}, events=events))[title]
    assert isinstance(chart, Chart)
    return chart
