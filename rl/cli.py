"""The `lockstep` command: train, report and doctor are here, the others in `rl/cli_*.py`."""

import importlib.metadata
import os
from pathlib import Path
from typing import Annotated

import typer

from rl.cli_bench import bench_app
from rl.cli_compare import compare
from rl.cli_data import data_app
from rl.cli_diagnose import diagnose_run
from rl.cli_eval import compare_eval, eval_policy
from rl.cli_monitor import monitor
from rl.cli_plan import plan
from rl.cli_policy import export, generate_text
from rl.cli_reward import reward_app
from rl.cli_serve import serve
from rl.cli_support import clear_errors, console
from rl.threads import THREAD_ENVIRONMENT

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")
app.add_typer(reward_app, name="reward")
app.command("eval")(eval_policy)
app.command("compare")(compare)
app.command("compare-eval")(compare_eval)
app.command("diagnose")(diagnose_run)
app.command("export")(export)
app.command("generate")(generate_text)
app.command("monitor")(monitor)
app.command("plan")(plan)
app.command("serve")(serve)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"lockstep {importlib.metadata.version('lockstep-rl')}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Reinforcement learning for reasoning, in which sampler and learner agree bit for bit."""
    for name, value in THREAD_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, such as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Replace recipe values.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder; by default runs/NAME-TIME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --run-dir, or the newest run of this name.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print recipe and plan; touch nothing.")] = False,
) -> None:
    """Trains the policy of a recipe and leaves everything in a run folder."""
    with clear_errors():
        from rl.config import load_recipe
        from rl.run_folder import default_run_dir, newest_run_dir

        resolved = load_recipe(recipe, overrides or [])
        from rl.train import plan as training_plan
        from rl.train import run_training

        if dry_run:
            console.print(training_plan(resolved), highlight=False, markup=False, soft_wrap=True)
            return
        folder = run_dir or (newest_run_dir(resolved.name) if resume else default_run_dir(resolved.name))
        run_training(resolved, folder, resume, console)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    base: Annotated[
        Path | None,
        typer.Option(help="Recipe file or run folder that the recipe is shown against; by default the defaults."),
    ] = None,
) -> None:
    """Writes RUN/report.html anew."""
    with clear_errors():
        from rl.report import write_report
        from rl.run_folder import RunFolder

        console.print(str(write_report(RunFolder.open(run).path, base)), highlight=False, soft_wrap=True)


@app.command()
def doctor(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the checks to this file too.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to check with; by default all cores.")] = None,
) -> None:
    """Checks that this machine keeps the alignment contract; exits with 1 when it does not."""
    with clear_errors():
        from rl.doctor import doctor_json, doctor_report, exit_code, run_checks

        checks = run_checks(threads)
        console.print(doctor_report(checks))
        if json_file:
            json_file.write_text(doctor_json(checks))
        raise typer.Exit(exit_code(checks))
