"""The result of `lockstep bench alignment`, as the command prints it, a run folder keeps it and the report shows it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

RESULT_FILE = "alignment_cost.json"
COLUMNS = ("what", "fast form of", "aligned", "fast", "aligned / fast (range)")


@dataclass(frozen=True)
class Cost:
    """Of what is measured, with all operators aligned against those named in `fast` in their fast form.

    aligned, unaligned: seconds, medians over the rounds. ratio: of the two within a round, the median; low and high:
    the least and the greatest of the rounds.
    """

    what: str
    fast: str
    aligned: float
    unaligned: float
    ratio: float
    low: float
    high: float

    def shown(self) -> tuple[str, ...]:
        """The values of `COLUMNS`."""
        ratio = f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"
        return self.what, self.fast, _seconds(self.aligned), _seconds(self.unaligned), ratio


@dataclass(frozen=True)
class ShownCosts:
    headline: str
    rows: list[tuple[str, ...]]
    columns: tuple[str, ...] = COLUMNS


def shown_costs(run_dir: Path) -> ShownCosts | None:
    """What was measured of a run; None where nothing was. Raises ValueError when the file is damaged."""
    path = run_dir / RESULT_FILE
    if not path.exists():
        return None
    try:
        return shown(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not what `lockstep bench alignment` wrote ({error!r}); remove it") from None


def shown(result: Mapping[str, Any]) -> ShownCosts:
    """result: what `rl.bench_alignment.measure` gave."""
    load = result["load"]
    headline = (
        f"{result['policy']}, {result['parameters']:,} parameters, {result['dtype']}, {result['device']}, "
        f"{result['threads']} threads; {load['sequences']} sequences of {load['prompt']} + {load['new_tokens']} tokens"
    )
    return ShownCosts(headline, [Cost(**cost).shown() for cost in result["costs"]])


def cost_table(result: Mapping[str, Any]) -> Table:
    costs = shown(result)
    table = Table(title=Text(f"cost of alignment: {costs.headline}"), title_justify="left")
    for place, name in enumerate(costs.columns):
        table.add_column(name, justify="left" if place < 2 else "right", overflow="fold")
    for row in costs.rows:
        table.add_row(*map(Text, row))
    return table


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"
