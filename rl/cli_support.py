"""What all commands share: the console, and errors that end in one clear message."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

PolicyArgument = Annotated[Path, typer.Argument(help="Hugging Face folder of a policy, or a run folder.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides every sampled token.")]

console = Console()
_errors = Console(stderr=True)


@contextmanager
def clear_errors(how_to_go_on: str = "go on with --resume") -> Iterator[None]:
    """A user's mistake or a machine's limit: its message and exit code 1. A defect of ours keeps its traceback.

    how_to_go_on: what is said to a user whose command was interrupted, or ran out of disk space.
    """
    try:
        yield
    except BrokenPipeError:
        os._exit(1)  # The reader of our output has gone; nothing can be said to it.
    except (ValueError, FloatingPointError) as error:
        _fail(str(error))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        remedy = f"; free some space and {how_to_go_on}" if error.errno == errno.ENOSPC else ""
        _fail(f"{error.strerror or error}{where}{remedy}. What was already written is intact")
    except KeyboardInterrupt:
        _errors.print(f"interrupted; {how_to_go_on}", soft_wrap=True)
        raise typer.Exit(130) from None


def _fail(message: str) -> None:
    _errors.print("error:", style="bold red", end=" ")
    _errors.print(message, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1)
