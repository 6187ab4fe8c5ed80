"""`lockstep plan`: does it fit, before anything is started."""

from pathlib import Path
from typing import Annotated

import typer

from rl.cli_support import clear_errors, console


def plan(
    what: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe, or the folder or config.json of a policy.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Replace recipe values.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, max=1024, help="GPUs that the run would have.")] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Memory of each: 141GB is an H200.")] = "141GB",
) -> None:
    """Counts parameters and memory of a run, and says whether it fits and what to change; starts and writes nothing."""
    with clear_errors():
        from rl.plan import recipe_to_plan
        from rl.plan_report import Machine, parse_memory, plan_report

        machine = Machine(gpus, parse_memory(gpu_memory))
        console.print(plan_report(recipe_to_plan(what, overrides or []), machine), highlight=False, soft_wrap=True)
