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

from reward.composite import RewardInput
from rl.advantage import group_advantages
from rl.config import Recipe
from rl.data import source_labels, source_of
from rl.dynamic_sampling import Gathered, gather
from rl.eval_scores import score_names
from rl.evaluate import evaluate
from rl.mismatch import Comparison, MismatchError, Sampled, full_vocab_choice
from rl.monitor import Monitor
from rl.prompt_order import PromptOrder
from rl.prompts import Prompt, completion_text
from rl.reward_alarm import FailureAlarm
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
    alarm: FailureAlarm
    order: PromptOrder
    cursor: int = 0  # batches of prompts drawn so far; a checkpoint keeps it

    def next_prompts(self, step: int) -> list[Prompt]:
        batch = self.order.batch(step - 1, self.cursor)
        self.cursor += 1
        return [self.prompts[index] for index in batch]


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
    for step in range(first_step + 1, loop.steps + 1):
        metrics = train_step(run, step)
        every = run.recipe.evaluation.every
        if every and step % every == 0 and step < loop.steps:
            metrics |= evaluation_metrics(evaluate_at(run, step))
        run.monitor.log(step, metrics)
        if step % loop.checkpoint_every == 0 or step == loop.steps:
            save_checkpoint(run, step)


def train_step(run: Run, step: int) -> dict[str, float]:
    """One step of GRPO; returns its metrics. Raises MismatchError or RewardFailureError before any weight changes."""
    clock, start = StageClock(), time.perf_counter()
    gathered = gather_groups(run, step, clock)
    scored = gathered.kept
    failures = watch_failures(run, step, gathered.sampled)
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
        **(gathered.metrics() if loop.dynamic_sampling.max_rounds > 1 else {}),
        **source_metrics(run.recipe, gathered.sampled),
        **failures,
        **result.metrics,
        **applied,
        **comparison.metrics(),
        **times,
        "time/step": time.perf_counter() - start,
        "rollout/tokens_per_second": gathered.tokens / times["time/rollout"],
        "trainer/tokens_per_second": sum(len(each.prompt.token_ids) for each in scored) / times["time/train"]
        + result.tokens / times["time/train"],
    }


def gather_groups(run: Run, step: int, clock: StageClock) -> Gathered:
    """Samples and scores the groups of a step, in more than one round where the recipe allows it and too few teach."""
    loop, asked = run.recipe.loop, Counter[int]()

    def sample_round() -> list[Scored]:
        prompts = run.next_prompts(step)
        with clock("rollout"):
            completions = run.system.generate(step_requests(run.recipe, step, prompts, len(run.prompts), asked))
        with clock("reward"):
            return score(run, prompts, completions)

    return gather(sample_round, loop.group_size, loop.prompts_per_step, loop.dynamic_sampling.max_rounds)


def step_requests(
    recipe: Recipe, step: int, prompts: list[Prompt], num_rows: int, asked: Counter[int]
) -> list[Request]:
    """One request for each prompt. A row asked again in the same step draws as another row would, beyond the last.

    asked: how often earlier rounds of the step asked each row; brought up to date. The whole vocabulary is kept for
    completions of the first round.
    """
    loop, rollout = recipe.loop, recipe.rollout
    sampling = SamplingParams(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    pairs = [(place, sample) for place in range(len(prompts)) for sample in range(loop.group_size)]
    full_vocab = {} if asked else full_vocab_choice(recipe.seed, step, pairs, loop.full_vocab_sequences)
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
    asked = [prompts[completion.request_id] for completion in completions]
    rewards = run.system.rewards([reward_input(*each) for each in zip(asked, completions, texts, strict=True)])
    totals = np.array([np.nan if reward.total is None else reward.total for reward in rewards])
    advantages = group_advantages(totals.reshape(-1, run.recipe.loop.group_size)).flatten().tolist()
    return [Scored(*each) for each in zip(asked, completions, texts, rewards, advantages, strict=True)]


def reward_input(prompt: Prompt, completion: Completion, text: str) -> RewardInput:
    return RewardInput(
        completion=text,
        prompt=prompt.text,
        answer=prompt.row.answer,
        num_tokens=len(completion.token_ids),
        truncated=completion.finish_reason == "length",
        columns=prompt.row.columns,
    )


def source_metrics(recipe: Recipe, sampled: list[Scored]) -> dict[str, float]:
    """Prompts asked of every source, where there are several."""
    sources = [each.source for each in recipe.data.train]
    if len(sources) == 1:
        return {}
    asked = Counter(source_of(each.prompt.row) for each in sampled)
    labelled = zip(source_labels(sources), sources, strict=True)
    return {f"data/prompts/{label}": asked[source] / recipe.loop.group_size for label, source in labelled}


def watch_failures(run: Run, step: int, scored: list[Scored]) -> dict[str, float]:
    """Warns of a rising share of failed rewards. Raises RewardFailureError when it exceeds the recipe's limit."""
    warning = run.alarm.observe(step, [each.reward for each in scored])
    if warning:
        run.console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    return {**run.alarm.metrics(), "reward/failure_alarm": float(warning is not None)}


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
    run.system.save_checkpoint(path, {"step": step, "data_cursor": run.cursor})
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
    return {f"eval/{name}": result[name] for name in score_names(result)}
