"""`lockstep reward`: what a verifier or a user's reward function makes of a completion."""

from pathlib import Path
from typing import Annotated

import typer

from rl.cli_support import clear_errors, console

reward_app = typer.Typer(no_args_is_help=True, help="Try the verifier, or a reward function of your own.")


@reward_app.command("check")
def reward_check(
    completion: Annotated[str, typer.Argument(help="What a policy wrote, whole.")],
    answer: Annotated[str, typer.Option(help="The gold answer.")],
    marker: Annotated[str, typer.Option(help="What announces the answer, as reward.answer_marker.")] = "\\boxed",
) -> None:
    """Verifies one completion and says why; exits with 1 if the verification failed."""
    with clear_errors():
        from rich.table import Table
        from rich.text import Text

        from reward.config import RewardConfig
        from reward.pool import RewardPool

        with RewardPool(RewardConfig(answer_marker=marker)) as pool:
            (result,) = pool.score([(completion, answer)])
        table = Table(show_header=False)
        rows = {
            "score": "none, the verification failed" if result.is_failure else f"{result.score:g}",
            "reason": str(result.reason),
            "extracted": "nothing" if result.extracted is None else result.extracted,
            "gold": answer if result.gold is None else result.gold,
            "method": str(result.method),
            "milliseconds": f"{result.milliseconds:.2f}",
        }
        for name, value in rows.items():
            table.add_row(name, Text(value))
        console.print(table)
        raise typer.Exit(1 if result.is_failure else 0)


@reward_app.command("test")
def reward_test(
    function: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="The function, as in a recipe.")],
    data: Annotated[
        Path | None, typer.Option(help="JSONL: `completion` and other arguments a line, or a run's rollouts file.")
    ] = None,
) -> None:
    """Calls a reward function under the limits of a run and prints what it says; exits with 1 if anything is wrong."""
    with clear_errors():
        from reward.config import RewardConfig
        from rl.reward_trial import EXAMPLES, check_path, read_inputs, trial_table, try_function

        check_path(function)
        trials = try_function(function, read_inputs(data) if data else EXAMPLES, RewardConfig())
        console.print(trial_table(function, trials))
        wrong = sum(bool(trial.problem) for trial in trials)
        console.print(f"{len(trials)} completions, {wrong} with something wrong", highlight=False)
        raise typer.Exit(1 if wrong else 0)
