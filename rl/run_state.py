"""What every step of a run works with."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from rl.alarms import Alarms
from rl.config import Recipe
from rl.events import EventLog
from rl.monitor import Monitor
from rl.prompt_order import PromptOrder
from rl.prompts import Prompt
from rl.reward_alarm import FailureAlarm
from rl.rollouts import Scored, write_rollouts
from rl.run_folder import RunFolder
from rl.system import System
from trainer.state import checkpoint_path, prune
from trainer.trainer import StepResult


@dataclass
class StageClock:
    """Seconds of each stage of a step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        return {f"time/{stage}": seconds for stage, seconds in self.seconds.items()}


@dataclass
class Run:
    """Everything a step works with."""

    recipe: Recipe
    folder: RunFolder
    system: System
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    monitor: Monitor
    console: Console
    alarm: FailureAlarm
    alarms: Alarms
    events: EventLog
    order: PromptOrder
    cursor: int = 0  # batches of prompts drawn so far
    rollouts_refused: bool = False  # by the disk, which has been said

    def next_prompts(self, step: int) -> list[Prompt]:
        batch = self.order.batch(step - 1, self.cursor)
        self.cursor += 1
        return [self.prompts[index] for index in batch]


def save_rollouts(run: Run, step: int, scored: list[Scored], result: StepResult) -> None:
    """A record for people, as the metrics are: a full disk stops nothing, and is said once."""
    path, loop = run.folder.rollouts(step), run.recipe.loop
    shown = (scored, result.log_probs, result.entropies, run.tokenizer, loop.group_size, loop.rollouts_saved)
    try:
        write_rollouts(path, step, *shown)
    except OSError as error:
        if not run.rollouts_refused:
            text = f"warning: {path} cannot be written ({error}); the run goes on without the rollouts of such steps"
            run.console.print(text, style="yellow", markup=False, soft_wrap=True)
        run.rollouts_refused = True


def save_checkpoint(run: Run, step: int, cursor: int) -> None:
    path = checkpoint_path(run.folder.checkpoints, step)
    if path.exists():  # written by a worker that outlived the killed run which this one continues
        shutil.rmtree(path)
    extra: dict[str, Any] = {"step": step, "data_cursor": cursor}
    if unwritten := run.monitor.unwritten():
        extra["unwritten_metrics"] = unwritten
    run.system.save_checkpoint(path, extra)
    prune(run.folder.checkpoints, run.recipe.loop.keep_checkpoints)
