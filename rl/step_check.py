"""Trainer against sampler, before a weight changes: what differs, which alarms that sounds, and what they ask for."""

from collections.abc import Sequence

from rl.alarms import ON_ALARM, Alarm, AlarmError
from rl.diagnose.capture import capture_mismatch
from rl.metrics.agreement import top1_agreement
from rl.metrics.mismatch import mismatch_metrics
from rl.metrics.pairs import Pairs
from rl.metrics.peers import peer_metrics
from rl.metrics.staleness import split, staleness_metrics
from rl.mismatch import Comparison, MismatchError, Sampled
from rl.monitor_config import PROMISED
from rl.rollouts import Scored, routing_metrics
from rl.run_state import Run, save_checkpoint
from rl.staleness import choose_rescored
from trainer.state import checkpoint_path
from trainer.trainer import StepResult


def compare(run: Run, step: int, scored: list[Scored], result: StepResult) -> Comparison:
    """Trainer against engine: every sampled token, and the whole vocabulary where the engine kept it.

    In an asynchronous run a seeded choice of completions, each token under the version of the weights it came from;
    the other metrics are of every token in either case.
    """
    comparison, rollout = Comparison(step), [each.completion.log_probs for each in scored]
    pairs = Pairs.of(result.log_probs, rollout)
    comparison.values |= mismatch_metrics(pairs) | peer_metrics(pairs, run.recipe.monitor.names)
    comparison.values |= staleness_metrics([each.completion.policy_versions for each in scored], step - 1)
    comparison.values |= routing_metrics(scored, result.routed_experts, run.recipe.rollout.routing_replay)
    if run.recipe.loop.max_staleness:
        places = choose_rescored(run.recipe, step, scored)
        chosen = [scored[place] for place in places]
        versions = [each.completion.policy_versions for each in chosen]
        rows = run.system.log_probs_of_versions([each.to_sample() for each in chosen], versions)
        for each, log_probs in zip(chosen, rows, strict=True):
            comparison.add(Sampled(each.prompt.row.id, each.completion.sample), log_probs, each.completion.log_probs)
        comparison.values |= split([result.log_probs[n] for n in places], rows, [rollout[n] for n in places])
        return comparison
    for each, log_probs in zip(scored, result.log_probs, strict=True):
        comparison.add(Sampled(each.prompt.row.id, each.completion.sample), log_probs, each.completion.log_probs)
    kept = [each for each in scored if each.completion.full_log_probs is not None]
    if kept:
        rows = run.system.full_log_probs([each.to_sample() for each in kept])
        recorded = [each.completion.full_log_probs for each in kept if each.completion.full_log_probs is not None]
        for each, log_probs, record in zip(kept, rows, recorded, strict=True):
            comparison.add_full_vocab(Sampled(each.prompt.row.id, each.completion.sample), log_probs, record)
        comparison.values |= top1_agreement(rows, recorded)
    return comparison


def act_on_alarms(
    run: Run, begun: Sequence[Alarm], done: int, cursor: int, comparison: Comparison | None = None
) -> None:
    """Says and records the alarms that begin to sound, and does what they ask for.

    done, cursor: what a checkpoint written now holds. Raises MismatchError, for a broken promise of equal bits, or
    AlarmError where an alarm says stop.
    """
    texts = [comparison.message() if comparison and each.metric in PROMISED else each.text for each in begun]
    for text, action in dict.fromkeys(zip(texts, (each.action for each in begun), strict=True)):
        run.events.append("alarm", f"{text} ({action})")
        if action != "stop":
            run.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)
    if any(each.action == "correct" for each in begun):
        run.system.set_correction(ON_ALARM)
        run.events.append("correction", f"switched on: {ON_ALARM.method}")
    stopping = [(each, text) for each, text in zip(begun, texts, strict=True) if each.action == "stop"]
    if stopping:
        if done and not checkpoint_path(run.folder.checkpoints, done).exists():
            save_checkpoint(run, done, cursor)
        raise stop_error(*stopping[0], done)


def save_mismatch(run: Run, comparison: Comparison, scored: list[Scored], result: StepResult) -> None:
    """For `lockstep diagnose`. A full disk stops nothing."""
    entries = comparison.full_vocab_unequal
    try:
        saved = capture_mismatch(run.system, run.folder, run.recipe, comparison.step, scored, result.log_probs, entries)
    except OSError as error:
        text = f"warning: the mismatch could not be saved for `lockstep diagnose`: {error}"
        run.console.print(text, style="yellow", markup=False, soft_wrap=True)
    else:
        if saved:
            text = f"the mismatch is saved in {saved}; `lockstep diagnose {run.folder.path}` looks for its cause"
            run.console.print(text, markup=False, soft_wrap=True)


def stop_error(alarm: Alarm, text: str, done: int) -> Exception:
    if alarm.metric in PROMISED:
        return MismatchError(
            f"{text}. No weight was changed by this step. `lockstep doctor` tells whether this machine "
            "keeps the alignment contract; loop.on_mismatch=warn goes on regardless"
        )
    kept = f"The weights after {done} steps are in the newest checkpoint" if done else "No weight was changed"
    return AlarmError(
        f"{text}, for which monitor.alarms says stop. {kept}. Go on with --resume and other bounds or action: warn"
    )


def say_unwatched(run: Run, metrics: dict[str, float]) -> None:
    """Warns of alarms whose metric the first step did not have; an evaluation may come later."""
    for name in run.alarms.unseen(metrics):
        if not name.startswith("eval/"):
            text = f"warning: monitor.alarms watches {name}, which this step did not measure"
            run.console.print(text, style="yellow", markup=False, soft_wrap=True)
