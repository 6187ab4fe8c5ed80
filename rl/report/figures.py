"""Draws what has no steps on its axis, as SVG: bars, a scatter on the unit square, bars of time in lanes."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rl.report.svg import Key, add, add_tooltip, canvas, markup, tick_label, ticks

WIDTH, LEFT, RIGHT, TOP = 480, 56, 464, 12


@dataclass(frozen=True)
class Bars:
    """A value for each of a few categories, 0 or more."""

    title: str
    unit: str
    values: dict[str, float]
    note: str = ""

    @property
    def keys(self) -> list[Key]:
        return []

    @property
    def svg(self) -> Markup:
        bottom, svg = 194, canvas(self.title, WIDTH, 220)
        high = 1.05 * max(self.values.values()) or 1.0
        for value in ticks(0.0, high) if any(self.values.values()) else [0.0]:
            y = bottom - (bottom - TOP) * value / high
            add(svg, "path", "grid", d=f"M{LEFT} {y:.1f}H{RIGHT}")
            add(svg, "text", "y", x=LEFT - 6, y=y + 4).text = tick_label(value)
        column = (RIGHT - LEFT) / len(self.values)
        for index, (name, value) in enumerate(self.values.items()):
            left, height = LEFT + column * index, max(2.0, (bottom - TOP) * value / high)
            add(svg, "rect", "bar s0", x=left + column * 0.15, y=bottom - height, width=column * 0.7, height=height)
            if index % -(-len(self.values) // 8) == 0:
                add(svg, "text", "x", x=left + column / 2, y=212).text = name
            place = {"x": left, "y": TOP, "width": column, "height": bottom - TOP}
            add_tooltip(svg, place, f"{name}: {value:.6g}")
        return markup(svg)


@dataclass(frozen=True)
class Scatter:
    """Points on the unit square, those off its diagonal in another colour."""

    title: str
    unit: str
    points: Sequence[tuple[float, float]]
    x_name: str
    y_name: str
    note: str = ""

    @property
    def keys(self) -> list[Key]:
        return [(0, "equal"), (1, "different")]

    @property
    def svg(self) -> Markup:
        bottom, side = 222, 210
        svg = canvas(self.title, WIDTH, 270)
        for value in (0.0, 0.25, 0.5, 0.75, 1.0):
            x, y = LEFT + side * value, bottom - side * value
            add(svg, "path", "grid", d=f"M{LEFT} {y:.1f}h{side}M{x:.1f} {TOP}v{side}")
            add(svg, "text", "y", x=LEFT - 6, y=y + 4).text = f"{value:g}"
            add(svg, "text", "x", x=x, y=bottom + 20).text = f"{value:g}"
        add(svg, "text", "x", x=LEFT + side / 2, y=bottom + 40).text = self.x_name
        add(svg, "text", "", x=LEFT + side + 12, y=TOP + 14).text = self.y_name
        add(svg, "path", "diagonal", d=f"M{LEFT} {bottom}l{side} {-side}")
        for index, equal in enumerate((True, False)):
            chosen = [(x, y) for x, y in self.points if (x == y) == equal]
            path = "".join(f"M{LEFT + side * x:.1f} {bottom - side * y:.1f}h0" for x, y in chosen)
            add(svg, "path", f"points s{index}", d=path or "M0 0")
        return markup(svg)


@dataclass(frozen=True)
class TimeBar:
    """What a lane does from `start` to `end`, in seconds."""

    lane: str
    stage: str
    start: float
    end: float


@dataclass(frozen=True)
class Gantt:
    """Who does what at which time of one step; an empty stretch of a lane is waiting. stages: by colour."""

    title: str
    unit: str
    bars: Sequence[TimeBar]
    stages: Sequence[str]
    note: str = ""

    @property
    def keys(self) -> list[Key]:
        used = {bar.stage for bar in self.bars}
        return [(colour, stage) for colour, stage in enumerate(self.stages) if stage in used]

    @property
    def lanes(self) -> list[str]:
        return list(dict.fromkeys(bar.lane for bar in self.bars))

    @property
    def svg(self) -> Markup:
        row, left = 44, 84
        bottom = TOP + row * len(self.lanes)
        svg = canvas(self.title, WIDTH, bottom + 26)
        end = max(bar.end for bar in self.bars) or 1.0
        for second in ticks(0.0, end, most=6):
            x = left + (RIGHT - left) * second / end
            add(svg, "path", "grid", d=f"M{x:.1f} {TOP}V{bottom}")
            add(svg, "text", "x", x=x, y=bottom + 18).text = f"{tick_label(round(second, 9))} s"
        for index, lane in enumerate(self.lanes):
            add(svg, "text", "y", x=left - 8, y=TOP + row * (index + 0.5) + 5).text = lane
        for bar in self.bars:
            y = TOP + row * self.lanes.index(bar.lane) + 8
            x, width = left + (RIGHT - left) * bar.start / end, (RIGHT - left) * (bar.end - bar.start) / end
            place = {"x": x, "y": float(y), "width": max(width, 1.0), "height": row - 16.0}
            add(svg, "rect", f"bar s{self.stages.index(bar.stage)}", **place)
            seconds = f"{bar.stage} {bar.end - bar.start:.3g} s, from {bar.start:.3g} to {bar.end:.3g}"
            add_tooltip(svg, place, f"{bar.lane}: {seconds}")
        return markup(svg)


Figure = Bars | Scatter | Gantt
