"""The `lockstep` command: train, report, doctor, data; `rl/cli_policy.py` adds eval, export and generate."""

import importlib.metadata
import os
from pathlib import Path
from typing import Annotated

import typer

from rl.cli_policy import eval_policy, export, generate_text
from rl.cli_support import clear_errors, console
from rl.threads import THREAD_ENVIRONMENT

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data_app = typer.Typer(no_args_is_help=True, help="Make and check problem sets.")
app.add_typer(data_app, name="data")
app.command("eval")(eval_policy)
app.command("export")(export)
app.command("generate")(generate_text)


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
        from rl.train import plan, run_training

        if dry_run:
            console.print(plan(resolved), highlight=False, markup=False, soft_wrap=True)
            return
        folder = run_dir or (newest_run_dir(resolved.name) if resume else default_run_dir(resolved.name))
        run_training(resolved, folder, resume, console)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Writes RUN/report.html anew."""
    with clear_errors():
        from rl.report import write_report
        from rl.run_folder import RunFolder

        console.print(str(write_report(RunFolder.open(run).path)), highlight=False, soft_wrap=True)


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


@data_app.command("make")
def data_make(
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    count: Annotated[int, typer.Option(min=1)] = 100,
    split: Annotated[str, typer.Option(help="train or eval; the two never share a problem.")] = "train",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    difficulty: Annotated[int, typer.Option(min=1, max=3)] = 1,
) -> None:
    """Writes AIME-style problems with answers and worked solutions."""
    with clear_errors():
        from rl.data import write_jsonl
        from rl.problems import FAMILIES, generate

        if split not in ("train", "eval"):
            raise ValueError(f"--split {split}: must be train or eval")
        problems = generate("train" if split == "train" else "eval", count, seed, difficulty, FAMILIES)
        write_jsonl(problems, out)
        console.print(f"{len(problems)} problems written to {out}", highlight=False, soft_wrap=True)


@data_app.command("check")
def data_check(
    source: Annotated[str, typer.Argument(help="A .jsonl, .json or .parquet file, or a dataset name.")],
) -> None:
    """Lists what a run would make of a problem set, and every bad row; exits with 1 when there is one."""
    with clear_errors():
        from rl.data import check_report, load_rows

        rows, bad = load_rows(source)
        console.print(check_report(source, rows, bad), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1 if bad or not rows else 0)
