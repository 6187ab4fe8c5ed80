"""`lockstep diagnose`: the first cause of a saved mismatch. It runs in this process, without Ray."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rl.cli_support import clear_errors, console

if TYPE_CHECKING:
    from rl.diagnose.diagnosis import Diagnosis

_STYLES = {"passed": "green", "found": "bold red", "not needed": "dim"}


def diagnose_run(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    sample: Annotated[
        Path | None, typer.Option(help="A saved mismatch; by default the first under RUN/mismatch.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the diagnosis to this file too.")] = None,
) -> None:
    """Finds the first cause of a difference between trainer and engine; exit code 1 where there is one."""
    with clear_errors("diagnose again"):
        from rl.diagnose.diagnosis import diagnose
        from rl.diagnose.sample import first_sample
        from rl.monitor import replace_text

        diagnosis = diagnose(sample or first_sample(run))
        if json_file:
            replace_text(json_file, json.dumps(diagnosis.to_json(), indent=2) + "\n")
        _show(diagnosis)
    if diagnosis.finding:
        raise typer.Exit(1)


def _show(diagnosis: "Diagnosis") -> None:
    from rich.table import Table

    counted = f"{diagnosis.tokens_unequal} of {diagnosis.tokens} tokens of {diagnosis.sequences} sequences differ"
    size = f", by up to {diagnosis.mismatch:.3g} nats" if diagnosis.mismatch else ""
    console.print(f"{diagnosis.folder}: step {diagnosis.step}, {counted}{size}", markup=False, soft_wrap=True)
    table = Table("check", "result")
    for outcome in diagnosis.outcomes:
        table.add_row(outcome.check, outcome.result, style=_STYLES[outcome.result])
    console.print(table)
    for name, value in (diagnosis.finding.numbers if diagnosis.finding else {}).items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        console.print(f"  {name}: {shown}", markup=False, highlight=False, soft_wrap=True)
    if diagnosis.finding:
        console.print(f"  suspect: {diagnosis.finding.setting}", markup=False, highlight=False, soft_wrap=True)
    console.print(diagnosis.verdict, style="bold", markup=False, highlight=False, soft_wrap=True)
