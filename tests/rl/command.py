"""The `lockstep` command in this process."""

from pathlib import Path

from typer.testing import CliRunner, Result

from rl.cli import app


def lockstep(*arguments: str | Path | int | float) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def refusal(*arguments: str | Path | int | float) -> str:
    """The message of a command that must end in one, with exit code 1 and no traceback."""
    result = lockstep(*arguments)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.output
    assert "Traceback" not in result.output
    first, *_ = result.stderr.splitlines()
    assert first.startswith("error: ") and result.stderr.count("error: ") == 1
    return result.stderr.removeprefix("error: ").strip()
