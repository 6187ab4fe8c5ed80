"""`lockstep monitor`: a run seen in a terminal, drawn from its folder alone, so that it can come and go as it likes."""

import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rl.config import Recipe, load_recipe
from rl.events import Event, read_events
from rl.monitor import Record, evaluation_metric, read_metrics, step_line
from rl.page import duration
from rl.regime import regime
from rl.report.summary import read_summary

REFRESH_SECONDS = 1.0
PANEL_WIDTH, CURVE_HEIGHT, SHOWN_EVENTS = 58, 4, 6
RECENT = 5  # steps that speeds and the remaining time are means of
# Stages in the order of a step; "wait" holds those before it in a synchronous run, and is what is left of them else.
STAGES = (("rollout", "cyan"), ("reward", "magenta"), ("train", "green"), ("check", "yellow"), ("sync", "blue"))
CURVES = (
    ("reward", "reward/mean", ".3f"),
    ("evaluation", None, ".3f"),
    ("k3, trainer against sampler", "mismatch/k3", ".2g"),
    ("tokens of a completion", "length/mean", ".1f"),
    ("entropy, nats", "policy/entropy", ".3f"),
    ("gradient norm", "policy/grad_norm", ".3g"),
)


@dataclass(frozen=True)
class Snapshot:
    """What a run folder says at one moment."""

    path: Path
    recipe: Recipe
    records: list[Record]
    events: list[Event]
    status: str

    @classmethod
    def read(cls, path: Path) -> "Snapshot":
        """Raises ValueError when the folder is no run."""
        if not (path / "recipe.yaml").is_file():
            raise ValueError(f"{path} holds no run (no recipe.yaml); give the folder of a run")
        summary = read_summary(path)
        status = str(summary.get("status", "starting"))
        return cls(path, load_recipe(path / "recipe.yaml"), read_metrics(path), read_events(path), status)

    @property
    def step(self) -> int:
        return int(self.records[-1]["step"] or 0) if self.records else 0

    @property
    def is_over(self) -> bool:
        return self.status not in ("starting", "running")

    def mean(self, metric: str) -> float | None:
        """Over the last steps that have it."""
        values = [value for record in self.records[-RECENT:] if (value := record.get(metric)) is not None]
        return sum(values) / len(values) if values else None

    def series(self, metric: str | None) -> list[tuple[int, float]]:
        """(step, value); None stands for the score of the evaluations."""
        found = []
        for record in self.records:
            name = metric or evaluation_metric(record)
            value = record.get(name) if name else None
            if value is not None:
                found.append((int(record["step"] or 0), value))
        return found


def newest_run(root: Path = Path("runs")) -> Path:
    """The run begun last. Raises ValueError when there is none."""
    recipes = sorted(root.glob("*/recipe.yaml"), key=lambda path: path.stat().st_mtime)
    if not recipes:
        raise ValueError(f"no run under {root}/; give the folder of one")
    return recipes[-1].parent


def watch(path: Path, console: Console) -> None:
    """Shows the run until it is over or the reader leaves: with q, or Ctrl-C. Where the output is no terminal, one
    plain line a step."""
    if not console.is_terminal:
        for line in follow_lines(path):
            console.print(line, soft_wrap=True)
        return
    with (
        _keys() as pressed,
        Live(dashboard(Snapshot.read(path), console.width), console=console, auto_refresh=False) as live,
    ):
        while True:
            snapshot = Snapshot.read(path)
            live.update(dashboard(snapshot, console.width), refresh=True)
            if snapshot.is_over or pressed(REFRESH_SECONDS) == "q":
                return


def follow_lines(path: Path) -> Iterator[Text]:
    """Steps and events as they are recorded, until the run is over."""
    steps = events = 0
    while True:
        snapshot = Snapshot.read(path)
        for event in snapshot.events[events:]:
            yield _event_text(event)
        for record in snapshot.records[steps:]:
            yield step_line(record, snapshot.recipe.loop.steps)
        # A run that is resumed forgets steps, and they come again.
        steps, events = len(snapshot.records), len(snapshot.events)
        if snapshot.is_over:
            yield Text(f"{snapshot.path}: {snapshot.status}")
            return
        time.sleep(REFRESH_SECONDS)


def dashboard(snapshot: Snapshot, width: int) -> RenderableType:
    """One screen, for a terminal of `width` columns."""
    panel_width = min(PANEL_WIDTH, width)
    panels = [_curve_panel(snapshot, title, metric, spec, panel_width) for title, metric, spec in CURVES]
    return Group(
        _header(snapshot, width),
        Columns([panel for panel in panels if panel is not None], padding=(0, 1)),
        *([_stages(snapshot, min(width, 2 * PANEL_WIDTH + 1))] if snapshot.records else []),
        *([_events(snapshot, width)] if snapshot.events else []),
        Text("" if snapshot.is_over else "q leaves; the run goes on", style="dim"),
    )


def _header(snapshot: Snapshot, width: int) -> RenderableType:
    steps, colour = snapshot.recipe.loop.steps, {"completed": "green", "running": "cyan"}.get(snapshot.status, "red")
    title = Text.assemble((snapshot.recipe.name, "bold"), "  ", (snapshot.status, colour), "  ", str(snapshot.path))
    title.truncate(width, overflow="ellipsis")
    seconds = snapshot.mean("time/step")
    left = "" if seconds is None or snapshot.is_over else f", {duration((steps - snapshot.step) * seconds)} left"
    facts = Table.grid(padding=(0, 2))
    facts.add_row("step", f"{snapshot.step}/{steps}{left}")
    facts.add_row("regime", regime(snapshot.recipe))
    facts.add_row("mismatch", _mismatch(snapshot))
    facts.add_row("tokens/s", _speeds(snapshot))
    facts.add_row("memory", _memory(snapshot))
    bar = ProgressBar(total=steps, completed=snapshot.step, width=min(width, PANEL_WIDTH))
    return Group(title, Padding(bar, (0, 0, 0, 0)), Text(), facts)


def _mismatch(snapshot: Snapshot) -> Text:
    compared, unequal = (
        sum(record.get(f"mismatch/tokens_{name}") or 0 for record in snapshot.records)
        for name in ("compared", "unequal")
    )
    text = f"{unequal:,.0f} of {compared:,.0f} tokens unequal"
    return Text(text, style="bold red" if unequal else "green" if compared else "")


def _speeds(snapshot: Snapshot) -> str:
    speeds = ((name, snapshot.mean(f"{name}/tokens_per_second")) for name in ("rollout", "trainer"))
    return "  ".join(f"{name} {speed:,.0f}" for name, speed in speeds if speed is not None) or "-"


def _memory(snapshot: Snapshot) -> str:
    kinds = ((name, snapshot.mean(f"memory/{name}_mb")) for name in ("driver", "trainer", "engine"))
    return "  ".join(f"{name} {mb / 1024:.1f} GiB" for name, mb in kinds if mb is not None) or "-"


def _curve_panel(snapshot: Snapshot, title: str, metric: str | None, spec: str, width: int) -> RenderableType | None:
    series = snapshot.series(metric)
    if not series:
        return None
    values = [value for _, value in series]
    numbers = f"now {format(values[-1], spec)}  min {format(min(values), spec)}  max {format(max(values), spec)}"
    lines = braille_curve(series, snapshot.recipe.loop.steps, width - 4, CURVE_HEIGHT)
    return Panel(Text("\n".join([*lines, numbers])), title=title, title_align="left", width=width)


def braille_curve(series: Sequence[tuple[int, float]], steps: int, width: int, height: int) -> list[str]:
    """The curve from step 0 to `steps` as `height` lines of `width` characters, each of 2 x 4 dots."""
    low, high = (choose(value for _, value in series) for choose in (min, max))
    scale = (4 * height - 1) / (high - low) if high > low else 0.0
    dots = [[0] * width for _ in range(height)]
    for column in range(2 * width):
        value = _value_at(series, steps * column / max(2 * width - 1, 1))
        if value is not None:
            row = round((value - low) * scale) if scale else 0
            line, dot = height - 1 - row // 4, row % 4
            dots[line][column // 2] |= _DOTS[column % 2][dot]
    return ["".join(chr(0x2800 + dot) for dot in line) for line in dots]


_DOTS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))  # of a braille character: left and right, from below


def _value_at(series: Sequence[tuple[int, float]], step: float) -> float | None:
    """Between two points on the line; none outside of what was measured, but a lone point is drawn as half a step."""
    if step < series[0][0] - 0.5 or step > series[-1][0] + 0.5:
        return None
    before = max((point for point in series if point[0] <= step), default=series[0])
    after = min((point for point in series if point[0] >= step), default=series[-1])
    if after[0] == before[0]:
        return before[1]
    return before[1] + (after[1] - before[1]) * (step - before[0]) / (after[0] - before[0])


def _stages(snapshot: Snapshot, width: int) -> RenderableType:
    """Where a step's time goes. Asynchronous: sampling overlaps with training, so the shares are of busy time."""
    seconds = [(name, colour, snapshot.mean(f"time/{name}") or 0.0) for name, colour in STAGES]
    total = sum(value for *_, value in seconds) or 1.0
    bar, legend = Text(), Text()
    for name, colour, value in seconds:
        bar.append("█" * round(value / total * (width - 4)), style=colour)
        legend.append("■\N{NO-BREAK SPACE}", style=colour).append(
            f"{name} {value:.2f} s  ".replace(" ", "\N{NO-BREAK SPACE}", 2)
        )
    if snapshot.recipe.loop.max_staleness:
        legend.append(f"waited {snapshot.mean('time/wait') or 0.0:.2f} s for samples")
    return Panel(
        Group(bar, legend), title=f"a step, {snapshot.mean('time/step') or 0:.2f} s", title_align="left", width=width
    )


def _events(snapshot: Snapshot, width: int) -> RenderableType:
    shown = Text("\n").join(_event_text(event) for event in snapshot.events[-SHOWN_EVENTS:])
    return Panel(
        shown, title=f"events, {len(snapshot.events)}", title_align="left", width=min(width, 2 * PANEL_WIDTH + 1)
    )


def _event_text(event: Event) -> Text:
    colour = {"alarm": "bold red", "restart": "yellow", "skip": "yellow"}.get(event.kind, "cyan")
    safe = "".join(each if each.isprintable() else " " for each in event.text)
    return Text.assemble(f"step {event.step} ", (event.kind, colour), f" {safe}")


@contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits up to so many seconds for a key and returns it, "" if none came."""
    if not sys.stdin.isatty():

        def sleep(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield sleep
        return
    before = termios.tcgetattr(sys.stdin)

    def pressed(seconds: float) -> str:
        return sys.stdin.read(1) if select.select([sys.stdin], [], [], seconds)[0] else ""

    try:
        tty.setcbreak(sys.stdin)
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
