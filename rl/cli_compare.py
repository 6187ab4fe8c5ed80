"""`lockstep compare`: runs side by side."""

from pathlib import Path
from typing import Annotated

import typer

from rl.cli_support import clear_errors, console


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders, finished or not.")],
    page: Annotated[Path | None, typer.Option(help="Write an HTML page with the curves too.")] = None,
) -> None:
    """Shows runs side by side: results with a paired test, mismatch, speeds, and where the recipes differ."""
    with clear_errors("compare again"):
        from rl.compare_runs import compare_runs, comparison_tables, read_runs, write_comparison

        found = compare_runs(read_runs(runs))
        for table in comparison_tables(found):
            console.print(table)
        for line in [found.same_weights, *found.notes]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if page:
            write_comparison(page, found)
            console.print(f"written to {page}", highlight=False, markup=False, soft_wrap=True)
