"""Tries a user's reward function on a few completions, under the limits it will have, before a run relies on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from reward.composite import RewardInput, within_range
from reward.config import FunctionConfig, RewardConfig
from reward.pool import RewardPool
from reward.result import CallResult
from rl.monitor import read_json_lines
from rl.recipe_errors import describe_problems

# A row may have a column that no other has, so a function has to accept any.
_ANY_COLUMN = "any_other_column"
_SHOWN_CHARACTERS = 48

EXAMPLES = tuple(
    RewardInput(completion, "Find 3 + 4.\n", "7", len(completion.split()), truncated)
    for completion, truncated in (
        ("3 + 4 = 7, so \\boxed{7}", False),
        ("3 + 4 = 8, so \\boxed{8}", False),
        ("", False),
        ("It is seven.", False),
        ("<think>3 + 4 = 7</think> \\boxed{\\frac{14}{2}}", False),
        ("3 + 4 = 3 + 4 = 3 + 4 = \\boxed{", True),
        ("因为三加四等于七, \\boxed{7}", False),
        ("\x00\u200b\ud800\u202e \\boxed{{{{", False),
        ("7 " * 20_000, True),
    )
)


@dataclass(frozen=True)
class Trial:
    """One completion and what the function made of it, twice: in order, and in reverse in another process."""

    input: RewardInput
    first: CallResult
    second: CallResult

    @property
    def problem(self) -> str:
        """What is wrong, empty if nothing."""
        if self.first.value is None:
            return self.first.message
        if self.second.value != self.first.value:
            second = self.second.message if self.second.value is None else f"returned {self.second.value}"
            return f"{second} when called again; a reward must follow from its arguments alone"
        return ""


def try_function(path: str, inputs: Sequence[RewardInput], config: RewardConfig) -> list[Trial]:
    """Calls the function FILE.py:NAME with every input twice. Raises ValueError if it cannot be loaded."""
    first = _call(path, inputs, config)
    second = _call(path, inputs[::-1], config)[::-1]
    return [Trial(*each) for each in zip(inputs, first, second, strict=True)]


def check_function(config: RewardConfig, prompt: str, answer: str, columns: Mapping[str, Any]) -> None:
    """Raises ValueError if the recipe's function fails on a right or on an empty completion of this problem."""
    function = config.components.function
    if function is None:
        return
    completions = (f"so \\boxed{{{answer}}}", "")
    inputs = [RewardInput(each, prompt, answer, len(each.split()), False, columns) for each in completions]
    for trial in try_function(function.path, inputs, config):
        if trial.problem:
            raise ValueError(
                f"reward.components.function: {function.path} fails on the completion {trial.input.completion!r}: "
                f"{trial.first.reason}: {trial.problem}. `lockstep reward test {function.path}` shows more"
            )


def check_path(path: str) -> None:
    """Raises ValueError if this does not name a file and a function in it."""
    try:
        FunctionConfig(path=path)
    except ValidationError as error:
        raise ValueError("; ".join(describe_problems(error, FunctionConfig))) from error


def read_inputs(path: Path) -> list[RewardInput]:
    """The completions of a JSONL file: one a line with the arguments of a reward function, or a run's rollouts.

    A line needs `completion`; `prompt` and `answer` are empty, `truncated` false and `num_tokens` the number of words
    where it has none. Raises ValueError for anything else.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a JSONL file of completions, such as a run's rollouts")
    inputs = [found for record in read_json_lines(path) for found in _inputs(record, path)]
    if not inputs:
        raise ValueError(f"{path}: no completions in it")
    return inputs


def trial_table(path: str, trials: Sequence[Trial]) -> Table:
    """What `lockstep reward test` prints."""
    table = Table("completion", "value", "reason", "ms", "what is wrong", title=path, title_justify="left")
    for trial in trials:
        text = trial.input.completion
        shown = ascii(text[:_SHOWN_CHARACTERS]) + ("…" if len(text) > _SHOWN_CHARACTERS else "")
        value = "-" if trial.first.value is None else f"{trial.first.value:g}"
        # Text, because completions and messages with [brackets] would be read as rich markup.
        cells = (shown, value, str(trial.first.reason), f"{trial.first.milliseconds:.1f}", trial.problem)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _call(path: str, inputs: Sequence[RewardInput], config: RewardConfig) -> list[CallResult]:
    items = [{**each.keywords(), _ANY_COLUMN: None} for each in inputs]
    with RewardPool(config) as pool:
        try:
            return [within_range(result) for result in pool.call(path, items)]
        except RuntimeError as error:  # its file hangs or dies when it is imported
            raise ValueError(f"{path}: {error}") from error


def _inputs(record: dict[str, Any], path: Path) -> list[RewardInput]:
    if "completions" in record:
        return [
            RewardInput(
                each["text"], record["prompt"], record["gold"], len(each["tokens"]), each["finish_reason"] == "length"
            )
            for each in record["completions"]
        ]
    given = dict(record)
    completion = given.pop("completion", None)
    if not isinstance(completion, str):
        raise ValueError(f"{path}: a line has no text under `completion`; its keys are {', '.join(record)}")
    return [
        RewardInput(
            completion,
            str(given.pop("prompt", "")),
            str(given.pop("answer", "")),
            int(given.pop("num_tokens", len(completion.split()))),
            bool(given.pop("truncated", False)),
            given,
        )
    ]
