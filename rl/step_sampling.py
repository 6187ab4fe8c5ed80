"""The first half of a step: prompts drawn, completions sampled and scored, advantages within each group."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from reward.composite import RewardInput
from rl.advantage import group_advantages
from rl.config import Recipe
from rl.data import source_labels, source_of
from rl.dynamic_sampling import Gathered, gather
from rl.mismatch import full_vocab_choice
from rl.prompts import Prompt, completion_text
from rl.rollouts import Scored
from rl.run_state import Run, StageClock
from rollout.request import Completion, Request, SamplingParams


@dataclass
class Batch:
    """What a step trains on, and what making it took."""

    gathered: Gathered
    clock: StageClock
    cursor_before: int  # of the run, as it was drawn
    cursor: int  # and afterwards


def sample_batch(run: Run, step: int) -> Batch:
    clock, before = StageClock(), run.cursor
    return Batch(gather_groups(run, step, clock), clock, before, run.cursor)


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
    kept = 0 if asked or loop.max_staleness else loop.full_vocab_sequences
    full_vocab = full_vocab_choice(recipe.seed, step, pairs, kept)
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
        run.events.append("alarm", warning)
        run.console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    return {**run.alarm.metrics(), "reward/failure_alarm": float(warning is not None)}
