"""How far an evaluation is: a bar on a terminal; in a log, a line every ten seconds and one at the end."""

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rl.eval_problem import ProblemResult
from rollout.request import Completion

SECONDS_BETWEEN_LINES = 10.0


class EvaluationProgress:
    """A context manager; hand it the completions and problems as they come.

    done, problems: how many problems were finished before, and how many there are.
    """

    def __init__(self, console: Console, done: int, problems: int, samples: int) -> None:
        self.console, self.problems, self.samples = console, problems, samples
        self.finished, self.completions, self.tokens = done, done * samples, 0
        self.started = self.last_line = time.monotonic()
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("completions, {task.description}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._bar.add_task(self._described(), total=problems * samples) if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def count(self, completions: Iterable[Completion]) -> Iterator[Completion]:
        """Passes the completions on and counts them."""
        for completion in completions:
            self.completions += 1
            self.tokens += len(completion.token_ids)
            yield completion
            self._show()

    def finish(self, problem: ProblemResult) -> None:
        self.finished += 1

    def _show(self) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self.completions, description=self._described())
            return
        total, now = self.problems * self.samples, time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES or self.completions == total:
            self.last_line = now
            line = f"evaluation: {self.completions:,} of {total:,} completions, {self._described()}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def _described(self) -> str:
        speed = self.tokens / max(time.monotonic() - self.started, 1e-9)
        return f"{self.finished:,} of {self.problems:,} problems, {speed:,.0f} tokens/s"
