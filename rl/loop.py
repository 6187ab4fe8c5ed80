"""The GRPO loop: sample, score, compare log-probs bit for bit, take one optimizer step, hand the weights over.

With loop.max_staleness = 0 every completion of a step is sampled from the weights that the step then changes. Because
the engine's log-probs are the trainer's to the bit, they serve as the old log-probs of the ratio (report Eq. 5) and no
second forward is needed. With a larger bound later batches are sampled while a step trains, the weights reach the
engines in the middle of it, and log-probs are compared under the version each token was drawn with.
"""

import time
from typing import Any

from rl.eval_scores import score_names
from rl.evaluate import evaluate
from rl.rollouts import rollout_metrics
from rl.run_state import Run, save_checkpoint, save_rollouts
from rl.sampling_ahead import SamplingAhead
from rl.step_check import act_on_alarms, compare, save_mismatch, say_unwatched
from rl.step_sampling import Batch, sample_batch, source_metrics, watch_failures
from rollout.request import SamplingParams


def train(run: Run, first_step: int) -> None:
    """Steps first_step + 1 .. loop.steps; a checkpoint of step n holds the weights after n optimizer steps."""
    loop = run.recipe.loop
    batches = SamplingAhead(lambda step: sample_batch(run, step), loop.steps, loop.max_staleness)
    for step in range(first_step + 1, loop.steps + 1):
        run.events.step, start = step, time.perf_counter()
        batch = batches.take(step)
        waited = time.perf_counter() - start
        metrics = train_step(run, step, batch)
        metrics |= {"time/wait": waited, "time/step": time.perf_counter() - start}
        every = run.recipe.evaluation.every
        if every and step % every == 0 and step < loop.steps:
            metrics |= evaluation_metrics(evaluate_at(run, step))
        begun = run.alarms.observe(metrics)
        run.monitor.log(step, metrics | run.alarms.metrics())
        if step % loop.checkpoint_every == 0 or step == loop.steps:
            save_checkpoint(run, step, batch.cursor)
        if step == first_step + 1:
            say_unwatched(run, metrics)
        act_on_alarms(run, begun, step, batch.cursor)


def train_step(run: Run, step: int, batch: Batch) -> dict[str, float]:
    """One step of GRPO; returns its metrics. Raises MismatchError, AlarmError or RewardFailureError before any weight
    changes."""
    gathered, clock = batch.gathered, batch.clock
    scored = gathered.kept
    failures = watch_failures(run, step, gathered.sampled)
    with clock("train"):
        result = run.system.compute([each.to_sample() for each in scored])
    with clock("check"):
        comparison = compare(run, step, scored, result)
    loop = run.recipe.loop
    known = {**rollout_metrics(scored, loop.group_size), **failures, **result.metrics, **comparison.metrics()}
    begun = run.alarms.observe(known)
    if any(alarm.metric.startswith("mismatch/") for alarm in begun):
        save_mismatch(run, comparison, scored, result)
    act_on_alarms(run, begun, step - 1, batch.cursor_before, comparison)
    with clock("train"):
        applied = run.system.apply()
    with clock("sync"):
        run.system.sync_weights()
    save_rollouts(run, step, scored, result)
    times = clock.metrics()
    return {
        **known,
        **(gathered.metrics() if loop.dynamic_sampling.max_rounds > 1 else {}),
        **source_metrics(run.recipe, gathered.sampled),
        **applied,
        **run.system.peak_memory(),
        **times,
        "rollout/tokens_per_second": gathered.tokens / times["time/rollout"],
        "trainer/tokens_per_second": sum(len(each.prompt.token_ids) for each in scored) / times["time/train"]
        + result.tokens / times["time/train"],
    }


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
