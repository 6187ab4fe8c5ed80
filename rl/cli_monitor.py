"""`lockstep monitor`: a run in the terminal, while it trains or afterwards."""

from pathlib import Path
from typing import Annotated

import typer

from rl.cli_support import clear_errors, console


def monitor(
    run: Annotated[Path | None, typer.Argument(help="Run folder [default: the newest under runs/].")] = None,
) -> None:
    """Shows a run in the terminal: curves, mismatch, timings, events. q leaves it; the run does not notice."""
    with clear_errors("watch again"):
        from rl.dashboard import newest_run, watch

        watch(run or newest_run(), console)
