"""Charts over steps: where lines go, what is left out of a long one, and numbers on axes."""

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.report.svg import COLUMNS, Chart, Point, Series, thinned, tick_label, ticks


def test_a_chart_breaks_its_line_where_a_value_is_missing() -> None:
    points = [(0.0, 0.0), (1.0, 1.0), (2.0, None), (3.0, 0.0)]
    chart = Chart("Entropy", "nats", [Series("entropy", points)])
    line = next(path.get("d") for path in paths(chart) if path.get("class") == "line s0")
    # From (56, 190), where 0 lies, to 1 at 1/1.05 of the height; then a dot alone at the right edge.
    assert line == "M56.0 190.0h0L192.0 20.5M464.0 190.0h0"


def test_stages_are_stacked_and_a_missing_stage_counts_as_zero() -> None:
    first, second = Series("rollout", [(1.0, 2.0), (2.0, 2.0)]), Series("train", [(1.0, None), (2.0, 2.0)])
    areas = {path.get("class"): path.get("d") for path in paths(Chart("Time", "s", [first, second], kind="area"))}
    # 4.2 seconds (the highest sum, 4, and a margin) span the 178 units from 190 up to 12.
    assert areas["area s0"] == "M56.0 105.2L464.0 105.2L464.0 190.0L56.0 190.0Z"
    assert areas["area s1"] == "M56.0 105.2L464.0 20.5L464.0 105.2L56.0 105.2Z"


def test_a_flat_zero_has_no_scale_but_the_zero() -> None:
    chart = Chart("Tokens unequal", "tokens", [Series("unequal", [(1.0, 0.0), (2.0, 0.0)])])
    labels = [text.text for text in ElementTree.fromstring(chart.svg).iter("text") if text.get("class") == "y"]
    assert labels == ["0"]
    assert [text.get("d") for text in paths(chart) if text.get("class") == "line s0"] == ["M56.0 190.0h0L464.0 190.0"]


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e9))
def test_ticks_are_few_inside_and_even(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    marks = ticks(low, high)
    assert 1 <= len(marks) <= 6
    assert low - 1e-6 * span <= marks[0] and marks[-1] <= high + 1e-6 * span


@pytest.mark.parametrize(
    ("value", "label"), [(0.0, "0"), (0.25, "0.25"), (1500.0, "1,500"), (20000.0, "20k"), (3e6, "3M"), (1e-7, "1e-07")]
)
def test_tick_labels_are_short(value: float, label: str) -> None:
    assert tick_label(value) == label


def test_a_line_of_agreement_near_1_fills_its_chart() -> None:
    points: list[Point] = [(1.0, 0.98), (2.0, 1.0)]
    chart = Chart("Expert agreement", "share", [Series("layer 0", points)], from_zero=False)
    lowest, highest = (float(part.split()[1]) for part in _line_of(chart).replace("h0", "")[1:].split("L"))
    assert lowest - highest > 150


def test_evaluations_stand_in_front_of_the_line_they_would_hide_behind() -> None:
    points: list[Point] = [(1.0, 0.5), (2.0, 0.5)]
    chart = Chart(
        "Reward", "", [Series("reward", points), Series("evaluation", points)], sparse=frozenset(["evaluation"])
    )
    drawn = [element.get("class") for element in ElementTree.fromstring(chart.svg)]
    assert drawn.index("line s0") < drawn.index("line s1") < drawn.index("dot s1")


def test_events_are_marked_where_they_happened() -> None:
    chart = Chart("Entropy", "", [Series("entropy", [(1.0, 1.0), (3.0, 1.0)])], marks=(2.0,))
    assert [path.get("d") for path in paths(chart) if path.get("class") == "mark"] == ["M260.0 12V194"]


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=11, max_size=40))
def test_a_thinned_line_keeps_ends_and_extremes_of_every_column(values: list[float | None]) -> None:
    """What is left out lies between values that are kept and fall on the same column, so no pixel shows it."""
    points: list[Point] = [(float(step), value) for step, value in enumerate(values)]
    kept = thinned(points, columns=5)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept}) and set(kept) <= set(points)
    last = len(points) - 1
    for column in range(5):
        inside = [each for each in points if min(int(each[0] / last * 5), 4) == column]
        measured = [value for _, value in inside if value is not None]
        drawn = [value for step, value in kept if (step, value) in set(inside) and value is not None]
        assert len(drawn) <= 4 and bool(drawn) == bool(measured)
        if measured:
            assert (drawn[0], min(drawn), max(drawn), drawn[-1]) == (
                measured[0],
                min(measured),
                max(measured),
                measured[-1],
            )


def test_a_line_that_has_room_is_drawn_whole() -> None:
    points: list[Point] = [(float(step), 0.5) for step in range(2 * COLUMNS)]
    assert thinned(points) == points


def _line_of(chart: Chart) -> str:
    return next(path.get("d") or "" for path in paths(chart) if path.get("class") == "line s0")


def paths(chart: Chart) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(chart.svg).iter("path"))
