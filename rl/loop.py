"""The GRPO loop: sample, score, compare log-probs bit for bit, take one optimizer step, hand the weights over.

Synchronous: every completion of a step is sampled from the weights that the step then changes. Because the engine's
log-probs are the trainer's to the bit, they serve as the old log-probs of the ratio (report Eq. 5) and no second
forward is needed.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from rl.advantage import group_advantages
from rl.config import Recipe
from rl.data import PromptOrder
from rl.evaluate import evaluate
from rl.mismatch import Comparison, MismatchError, Sampled, full_vocab_choice
from rl.monitor import Monitor
from rl.prompts import Prompt, completion_text
from rl.rollouts import Scored, rollout_metrics, write_rollouts
from rl.run_folder import RunFolder
from rl.system import System
from rollout.request import Completion, Request, SamplingParams
from trainer.state import checkpoint_path, prune
from trainer.trainer import StepResult


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


def train(run: Run, first_step: int) -> None:
    """Steps first_step + 1 .. loop.steps; a checkpoint of step n holds the weights after n optimizer steps."""
    loop = run.recipe.loop
    order = PromptOrder(len(run.prompts), run.recipe.seed)
    for step in range(first_step + 1, loop.steps + 1):
        prompts = [run.prompts[index] for index in order.batch(step - 1, loop.prompts_per_step)]
        metrics = train_step(run, step, prompts)
        every = run.recipe.evaluation.every
        if every and step % every == 0 and step < loop.steps:
            metrics |= evaluation_metrics(evaluate_at(run, step))
        run.monitor.log(step, metrics)
        if step % loop.checkpoint_every == 0 or step == loop.steps:
            save_checkpoint(run, step)


def train_step(run: Run, step: int, prompts: list[Prompt]) -> dict[str, float]:
    """One step of GRPO; returns its metrics. Raises MismatchError before any weight changes."""
    clock, start = StageClock(), time.perf_counter()
    with clock("rollout"):
        completions = run.system.generate(step_requests(run.recipe, step, prompts, len(run.prompts)))
    with clock("reward"):
        scored = score(run, prompts, completions)
    with clock("train"):
        result = run.system.compute([each.to_sample() for each in scored])
    with clock("check"):
        comparison = compare(run, step, scored, result)
    if not comparison.is_exact:
        report_mismatch(run, comparison)
    with clock("train"):
        applied = run.system.apply()
    with clock("sync"):
        run.system.sync_weights()
    loop = run.recipe.loop
    write_rollouts(
        run.folder.rollouts(step), step, scored, result.log_probs, run.tokenizer, loop.group_size, loop.rollouts_saved
    )
    times = clock.metrics()
    return {
        **rollout_metrics(scored, loop.group_size),
        **result.metrics,
        **applied,
        **comparison.metrics(),
        **times,
        "time/step": time.perf_counter() - start,
        "rollout/tokens_per_second": result.tokens / times["time/rollout"],
        "trainer/tokens_per_second": sum(len(each.prompt.token_ids) for each in scored) / times["time/train"]
        + result.tokens / times["time/train"],
    }


def step_requests(recipe: Recipe, step: int, prompts: list[Prompt], num_rows: int) -> list[Request]:
    """One request for each prompt. A row asked again in the same step draws as another row would, beyond the last."""
    loop, rollout = recipe.loop, recipe.rollout
    sampling = SamplingParams(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    pairs = [(place, sample) for place in range(len(prompts)) for sample in range(loop.group_size)]
    full_vocab = full_vocab_choice(recipe.seed, step, pairs, loop.full_vocab_sequences)
    asked: Counter[int] = Counter()
    requests = []
    for place, prompt in enumerate(prompts):
        draws_as = prompt.index + num_rows * asked[prompt.index]
        asked[prompt.index] += 1
        requests.append(
            Request(
                request_id=place,
                prompt_ids=prompt.token_ids,
                num_samples=loop.group_size,
                sampling=sampling,
                seed=recipe.seed,
                step=step,
                prompt=draws_as,
                full_vocab_samples=full_vocab.get(place, ()),
            )
        )
    return requests


def score(run: Run, prompts: list[Prompt], completions: list[Completion]) -> list[Scored]:
    """Completions in groups of group_size, in the order of the prompts, with rewards and advantages."""
    texts = [completion_text(completion.token_ids, run.tokenizer) for completion in completions]
    golds = [prompts[completion.request_id].row.answer for completion in completions]
    results = run.system.score(list(zip(texts, golds, strict=True)))
    rewards = np.array([result.score for result in results]).reshape(-1, run.recipe.loop.group_size)
    advantages = group_advantages(rewards).flatten().tolist()
    return [
        Scored(prompts[completion.request_id], completion, text, result, advantage)
        for completion, text, result, advantage in zip(completions, texts, results, advantages, strict=True)
    ]


def compare(run: Run, step: int, scored: list[Scored], result: StepResult) -> Comparison:
    """Trainer against engine: every sampled token, and the whole vocabulary where the engine kept it."""
    comparison = Comparison(step)
    for each, log_probs in zip(scored, result.log_probs, strict=True):
        comparison.add(Sampled(each.prompt.row.id, each.completion.sample), log_probs, each.completion.log_probs)
    kept = [each for each in scored if each.completion.full_log_probs is not None]
    if kept:
        rows = run.system.full_log_probs([each.to_sample() for each in kept])
        for each, log_probs in zip(kept, rows, strict=True):
            assert each.completion.full_log_probs is not None
            where = Sampled(each.prompt.row.id, each.completion.sample)
            comparison.add_full_vocab(where, log_probs, each.completion.full_log_probs)
    return comparison


def report_mismatch(run: Run, comparison: Comparison) -> None:
    if run.recipe.loop.on_mismatch == "stop":
        raise MismatchError(
            f"{comparison.message()}. No weight was changed by this step. `lockstep doctor` tells whether this machine "
            "keeps the alignment contract; loop.on_mismatch=warn goes on regardless"
        )
    run.console.print(f"warning: {comparison.message()}", style="yellow", markup=False, soft_wrap=True)


def save_checkpoint(run: Run, step: int) -> None:
    path = checkpoint_path(run.folder.checkpoints, step)
    if path.exists():  # written by a worker that outlived the killed run which this one continues
        shutil.rmtree(path)
    run.system.save_checkpoint(path, {"step": step})
    prune(run.folder.checkpoints, run.recipe.loop.keep_checkpoints)


def evaluate_at(run: Run, step: int) -> dict[str, Any]:
    """Evaluates the engines' weights, which are those after `step` steps, and keeps the result in the run folder."""
    settings = run.recipe.evaluation
    sampling = SamplingParams(settings.max_new_tokens, settings.temperature, settings.top_p)
    result = evaluate(
        run.eval_prompts,
        settings.samples,
        sampling,
        run.recipe.seed,
        run.tokenizer,
        run.system.generate,
        run.system.score,
    )
    run.folder.write_json(run.folder.evaluation(step), result)
    return result


def evaluation_metrics(result: dict[str, Any]) -> dict[str, float]:
    return {f"eval/{name}": value for name, value in result.items() if name.startswith(("mean@", "pass@"))}
