"""`lockstep bench`: what this machine does with a policy. In this process, without Ray."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rl.cli_support import clear_errors, console

bench_app = typer.Typer(no_args_is_help=True, help="Measures on this machine.")


@bench_app.callback()
def _bench() -> None:
    """Measures on this machine."""


@bench_app.command("alignment")
def bench_alignment(
    what: Annotated[
        Path, typer.Argument(metavar="RECIPE|RUN|POLICY", help="A recipe, a run, or a Hugging Face folder.")
    ] = Path("recipes/quickstart.yaml"),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Replace recipe values.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sampled at once, and trained on.")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a completion.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each form; ratios are medians of them.")] = 7,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here; by default into the folder of a run.")
    ] = None,
) -> None:
    """What agreement in every bit costs here: operators and a whole step, aligned and fast.

    Of a run, the result is kept in its folder, and its report shows it.
    """
    with clear_errors("measure again"):
        from rl.alignment_cost import RESULT_FILE, cost_table
        from rl.bench_alignment import Load, measure
        from rl.bench_policy import subject_of
        from rl.monitor import replace_text

        subject = subject_of(what, overrides or [])
        is_run = (what / "recipe.yaml").is_file()
        with console.status("measuring") as status:
            result = measure(subject, Load(sequences, prompt, new_tokens, rounds), status.update)
        console.print(cost_table(result))
        if path := json_file or (what / RESULT_FILE if is_run else None):
            replace_text(path, json.dumps(result, indent=2) + "\n")
            console.print(f"written to {path}", markup=False, soft_wrap=True)
        if is_run:
            from rl.report import write_report

            console.print(f"shown in {write_report(what)}", markup=False, soft_wrap=True)
