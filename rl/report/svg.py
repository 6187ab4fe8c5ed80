"""Draws quantities over steps as SVG: lines with gaps, sparse points, stacked areas.

Drawn here and not by a plotting library because the page's style sheet then colours the charts (light and dark), text
stays text, and every step can have a tooltip. Elements are built as a tree, so that every text is escaped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from markupsafe import Markup

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 464, 12, 194
ZERO_LIFT = 4  # a flat zero stays visible above the frame
MAX_TOOLTIPS = 200  # a chart of many steps has a tooltip at every n-th step
COLUMNS = RIGHT - LEFT  # stretches of steps that a longer line is drawn from

Point = tuple[float, float | None]
Key = tuple[int, str]
"""What a colour of the palette stands for."""


@dataclass(frozen=True)
class Series:
    """One quantity over steps: (step, value) in ascending steps; None is a step without a value.

    colour: place in the palette, by default the place among the series of its chart.
    """

    label: str
    points: list[Point]
    colour: int | None = None

    @property
    def last(self) -> float | None:
        return next((value for _, value in reversed(self.points) if value is not None), None)


@dataclass(frozen=True)
class Chart:
    """A titled set of series on common axes.

    x_name: what stands on the horizontal axis, in whole numbers.
    kind: "line" breaks at missing values, "area" stacks the series (missing counts as zero). Series named in `sparse`
    are measured at a few steps only: drawn as points, joined. marks: steps at which something happened to the run.
    from_zero: whether the vertical axis shows 0; else it begins at the lowest value.
    """

    title: str
    unit: str
    series: list[Series]
    kind: Literal["line", "area"] = "line"
    sparse: frozenset[str] = frozenset()
    note: str = ""
    x_name: str = "step"
    marks: tuple[float, ...] = ()
    from_zero: bool = True

    @property
    def colours(self) -> list[int]:
        return [index if one.colour is None else one.colour for index, one in enumerate(self.series)]

    @property
    def keys(self) -> list[Key]:
        """Of the series, where there are several."""
        labels = [series.label for series in self.series]
        return list(zip(self.colours, labels, strict=True)) if len(labels) > 1 else []

    @property
    def svg(self) -> Markup:
        return draw(self)


@dataclass(frozen=True)
class _Axes:
    x_min: float
    x_max: float
    y_min: float
    y_max: float

    def x(self, step: float) -> float:
        return LEFT + (RIGHT - LEFT) * (step - self.x_min) / (self.x_max - self.x_min)

    def y(self, value: float) -> float:
        bottom = BOTTOM - ZERO_LIFT
        return bottom - (bottom - TOP) * (value - self.y_min) / (self.y_max - self.y_min)


def draw(chart: Chart) -> Markup:
    """The chart as one `<svg>` element; coloured by the classes s0, s1, ... of its series."""
    layers = _stacked(chart.series) if chart.kind == "area" else [series.points for series in chart.series]
    axes = _axes(layers, chart.from_zero)
    svg = canvas(chart.title, WIDTH, HEIGHT)
    _draw_axes(svg, axes, flat_zero=not any(value for points in layers for _, value in points))
    for step in chart.marks:
        add(svg, "path", "mark", d=f"M{axes.x(step):.1f} {TOP}V{BOTTOM}")
    drawn = _thinned_layers(layers) if chart.kind == "area" else [thinned(points) for points in layers]
    # The first series in front, and in front of it the sparse ones.
    order = sorted(range(len(drawn)), key=lambda index: (chart.series[index].label in chart.sparse, -index))
    for index in order:
        _draw_series(svg, axes, chart, drawn, index)
    _draw_tooltips(svg, axes, chart)
    return markup(svg)


def canvas(title: str, width: float, height: float) -> ElementTree.Element:
    view_box = f"0 0 {width:g} {height:g}"
    return ElementTree.Element("svg", {"viewBox": view_box, "role": "img", "aria-label": title})


def markup(svg: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def thinned(points: list[Point], columns: int = COLUMNS) -> list[Point]:
    """The points that decide what a line over so many columns looks like: the first, lowest, highest and last of each.

    A column without any value keeps its gap. Up to two points a column, all are kept.
    """
    if len(points) <= 2 * columns:
        return points
    kept: list[Point] = []
    for column in _columns(points, columns):
        measured = [index for index, (_, value) in enumerate(column) if value is not None]
        by_value = sorted(measured, key=lambda index: column[index][1] or 0.0)
        deciding = {measured[0], by_value[0], by_value[-1], measured[-1]} if measured else {0}
        kept += [column[index] for index in sorted(deciding)]
    return kept


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in [low, high], at most `most`, evenly spaced by 1, 2 or 5 times a power of ten."""
    assert high > low and most >= 2
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A number short enough for an axis: 0.25, 1,500, 20k, 3M, 1e-07."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:,g}"


def _axes(drawn: list[list[Point]], from_zero: bool) -> _Axes:
    steps = [step for points in drawn for step, _ in points]
    values = [value for points in drawn for _, value in points if value is not None]
    assert steps, "a chart has at least one step"
    low, high = min(values, default=0.0), max(values, default=0.0)
    if from_zero or low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        high = 1.0
    margin = 0.05 * (high - low)
    x_max = max(steps) if max(steps) > min(steps) else min(steps) + 1
    return _Axes(min(steps), x_max, low - (margin if low else 0), high + margin)


def _stacked(series: list[Series]) -> list[list[Point]]:
    total: dict[float, float] = {}
    layers: list[list[Point]] = []
    for one in series:
        for step, value in one.points:
            total[step] = total.get(step, 0.0) + (value or 0.0)
        layers.append([(step, total[step]) for step, _ in one.points])
    return layers


def _thinned_layers(layers: list[list[Point]]) -> list[list[Point]]:
    """The same steps of every layer: those that decide the outline of the whole stack."""
    steps = {step for step, _ in thinned(layers[-1])}
    return [[point for point in layer if point[0] in steps] for layer in layers]


def _columns(points: Sequence[Point], count: int) -> list[list[Point]]:
    """Points in ascending steps, cut into stretches of equal width; without those that hold no point."""
    first, last = points[0][0], points[-1][0]
    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(min(int((point[0] - first) / (last - first) * count), count - 1), []).append(point)
    return list(columns.values())


def _draw_axes(svg: ElementTree.Element, axes: _Axes, flat_zero: bool) -> None:
    # An all-zero chart has no scale: numbering its axis would invent one.
    for value in [0.0] if flat_zero else ticks(axes.y_min, axes.y_max):
        y = axes.y(value)
        add(svg, "path", "grid", d=f"M{LEFT} {y:.1f}H{RIGHT}")
        add(svg, "text", "y", x=LEFT - 6, y=y + 4).text = tick_label(value)
    for step in ticks(axes.x_min, axes.x_max, most=7):
        if step == int(step):
            add(svg, "text", "x", x=axes.x(step), y=HEIGHT - 8).text = f"{step:.0f}"


def _line(axes: _Axes, points: list[Point]) -> str:
    path, pen_down = [], False
    for step, value in points:
        if value is not None:
            position = f"{axes.x(step):.1f} {axes.y(value):.1f}"
            # h0: with round line caps a value between two gaps shows as a dot
            path.append(f"L{position}" if pen_down else f"M{position}h0")
        pen_down = value is not None
    return "".join(path)


def _area(axes: _Axes, points: list[Point], below: list[Point]) -> str:
    outline = [*points, *reversed(below)]
    return "M" + "L".join(f"{axes.x(step):.1f} {axes.y(value or 0.0):.1f}" for step, value in outline) + "Z"


def _draw_series(svg: ElementTree.Element, axes: _Axes, chart: Chart, drawn: list[list[Point]], index: int) -> None:
    points, colour = drawn[index], chart.colours[index]
    if chart.kind == "area":
        below: list[Point] = drawn[index - 1] if index else [(step, 0.0) for step, _ in points]
        add(svg, "path", f"area s{colour}", d=_area(axes, points, below))
    elif chart.series[index].label in chart.sparse:
        _draw_sparse(svg, axes, points, colour)
    else:
        add(svg, "path", f"line s{colour}", d=_line(axes, points))


def _draw_sparse(svg: ElementTree.Element, axes: _Axes, points: list[Point], colour: int) -> None:
    measured = [(step, value) for step, value in points if value is not None]
    add(svg, "path", f"line s{colour}", d=_line(axes, [*measured]))
    for step, value in measured:
        add(svg, "circle", f"dot s{colour}", cx=axes.x(step), cy=axes.y(value), r=4.0)


def _draw_tooltips(svg: ElementTree.Element, axes: _Axes, chart: Chart) -> None:
    values: dict[float, list[str]] = {}
    for one in chart.series:
        for step, value in one.points:
            shown = [] if value is None else [f"{one.label} {value:.6g}"]
            values.setdefault(step, []).extend(shown)
    steps = sorted(values)
    steps = steps[:: math.ceil(len(steps) / MAX_TOOLTIPS)]
    band = (RIGHT - LEFT) / max(1, len(steps) - 1)
    for step in steps:
        place = {"x": axes.x(step) - band / 2, "y": TOP, "width": band, "height": BOTTOM - TOP}
        add_tooltip(svg, place, "\n".join([f"{chart.x_name} {step:.0f}", *values[step]]))


def add_tooltip(svg: ElementTree.Element, place: Mapping[str, float], text: str) -> None:
    """place: x, y, width and height of where the reader points."""
    ElementTree.SubElement(add(svg, "rect", "hit", **place), "title").text = text


def add(parent: ElementTree.Element, tag: str, css: str, **attributes: str | float) -> ElementTree.Element:
    shown = {name: value if isinstance(value, str) else f"{value:.1f}" for name, value in attributes.items()}
    return ElementTree.SubElement(parent, tag, {"class": css, **shown})
