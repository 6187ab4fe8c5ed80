"""Progress of an evaluation: plain lines in a log, a bar on a terminal."""

import io

import pytest
from rich.console import Console

from rl.eval_progress import EvaluationProgress
from tests.rl.graded import graded, problem
from tests.rl.tiny import make_completion

COMPLETIONS = [make_completion(request, sample, (1, 2, 3)) for request in range(3) for sample in range(2)]


def shown(monkeypatch: pytest.MonkeyPatch, seconds_each: float, terminal: bool = False) -> str:
    """What is shown of three problems with two completions, the first problem finished by an earlier process."""
    clock = iter(seconds_each * tick for tick in range(100))
    monkeypatch.setattr("rl.eval_progress.time.monotonic", lambda: next(clock))
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=terminal)
    with EvaluationProgress(console, done=1, problems=3, samples=2) as progress:
        for place, completion in enumerate(progress.count(COMPLETIONS[2:])):
            if completion.sample == 1:
                progress.finish(problem(place, graded("3")))
    return output.getvalue()


def test_a_log_gets_a_line_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = shown(monkeypatch, seconds_each=0.001).splitlines()
    assert line.startswith("evaluation: 6 of 6 completions, 3 of 3 problems, ") and line.endswith(" tokens/s")


def test_a_log_of_a_slow_evaluation_gets_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, seconds_each=11.0).splitlines()
    assert [line.partition(" of ")[0] for line in lines] == [f"evaluation: {count}" for count in (3, 4, 5, 6)]


def test_a_terminal_gets_no_lines() -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert "evaluation:" not in shown(patch, seconds_each=11.0, terminal=True)
