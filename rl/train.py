"""`lockstep train`, whole: checks, base policy, evaluation, training, evaluation, export, report."""

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from policy.checkpoint import DTYPES, save_config
from policy.config import PolicyConfig
from policy.lora import chosen_modules
from policy.machine import choose_device, choose_dtype
from policy.transformer import Policy
from reward.function_file import pin_function
from rl.alarms import ON_ALARM, Alarms, alarm_rules
from rl.base_policy import base_policy, base_tokenizer, cache_folder, planned_config
from rl.config import Recipe, load_recipe, recipe_digest, resolved_yaml
from rl.data import load_problems
from rl.events import EventLog
from rl.export import finish_export
from rl.loop import evaluate_at, evaluation_metrics, train
from rl.monitor import Monitor, Record, read_metrics, replace_text
from rl.monitor_config import correcting
from rl.problem_rules import select_problems
from rl.prompt_order import PromptOrder
from rl.prompts import Prompt, encode_prompts
from rl.regime import regime, unaligned_causes
from rl.report import summary_table, write_report
from rl.reward_alarm import FailureAlarm
from rl.reward_trial import check_function
from rl.run_folder import RunFolder
from rl.run_state import Run, StageClock
from rl.system import System
from rl.threads import MAX_TRAINER_THREADS
from rl.trackers import check_trackers, trackers
from trainer.state import latest_checkpoint

# Keys that may differ when a run is resumed: they cannot change a bit of the result.
FREE_KEYS = (
    "rollout.workers",
    "rollout.threads",
    "rollout.max_batch",
    "rollout.prefill_tokens",
    "rollout.memory_mb",
    "ray",
    "reward.workers",
    "reward.max_failure_fraction",
    "reward.failure_window",
    "loop.checkpoint_every",
    "loop.keep_checkpoints",
    "loop.rollouts_saved",
    "loop.on_mismatch",
    "monitor",
)


def resolve(recipe: Recipe) -> tuple[Recipe, str]:
    """Replaces "auto" and null by what this machine gets, so that the recipe in the run folder decides every bit."""
    device = choose_device(recipe.policy.device)
    dtype, reason = choose_dtype(recipe.policy.dtype, device)
    cores = len(os.sched_getaffinity(0))
    trainer_threads = recipe.trainer.threads or min(cores, MAX_TRAINER_THREADS)
    agrees = not unaligned_causes(recipe) and not recipe.loop.max_staleness
    correction = recipe.trainer.correction.resolved(agrees)
    name = next(name for name, value in DTYPES.items() if value == dtype)
    changes = {
        "policy": recipe.policy.model_copy(update={"device": device.type, "dtype": name}),
        "trainer": recipe.trainer.model_copy(update={"threads": trainer_threads, "correction": correction}),
        "reward": pin_function(recipe.reward),
        "rollout": recipe.rollout.model_copy(
            update={"threads": recipe.rollout.threads or max(1, cores // recipe.rollout.workers)}
        ),
    }
    return recipe.model_copy(update=changes), reason


def plan(recipe: Recipe) -> str:
    """What a run of this recipe would do; touches nothing."""
    resolved, reason = resolve(recipe)
    materials = prepare(recipe)
    config = planned_config(resolved, materials.tokenizer)
    loop, rollout = resolved.loop, resolved.rollout
    cached = resolved.policy.path is None and cache_folder(resolved).is_dir()
    base = resolved.policy.path or (f"cached in {cache_folder(resolved)}" if cached else "to be made by the warm start")
    lines = [
        resolved_yaml(resolved).rstrip(),
        "---",
        f"policy: {parameter_count(config):,} parameters, {config.num_hidden_layers} layers, "
        f"vocabulary {config.vocab_size}",
        f"base policy: {base}",
        f"dtype: {reason}",
        f"data: {len(materials.prompts)} training and {len(materials.eval_prompts)} held-out problems",
        *materials.notes,
        f"loop: {loop.steps} steps of {loop.prompts_per_step} prompts x {loop.group_size} completions",
        f"workers: {rollout.workers} engines x {rollout.threads} threads, a trainer with {resolved.trainer.threads}",
        f"regime: {regime(resolved)}",
        f"recipe digest: {recipe_digest(resolved.model_dump(mode='json'))}",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Materials:
    """What a run works on, read and encoded before anything is started or written."""

    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    order: PromptOrder
    notes: list[str]  # what the rules of the data section left out or found


def prepare(recipe: Recipe) -> Materials:
    """Raises ValueError for problems that cannot be read, a prompt that is too long, a reward function that fails,
    adapters that the policy has no place for, and a tracker that is not installed."""
    check_trackers(recipe.monitor)
    rows = load_problems(recipe.data, "train", recipe.seed)
    eval_rows = load_problems(recipe.data, "eval", recipe.seed)
    tokenizer = base_tokenizer(recipe)
    if recipe.lora:
        chosen_modules(planned_config(recipe, tokenizer), recipe.lora)
    rows, notes = select_problems(rows, eval_rows, recipe.data, tokenizer)
    order = PromptOrder.of(rows, recipe)
    prompts = encode_prompts(rows, recipe.data, tokenizer)
    check_function(recipe.reward, prompts[0].text, rows[0].answer, rows[0].columns)
    return Materials(tokenizer, prompts, encode_prompts(eval_rows, recipe.data, tokenizer), order, notes)


def run_training(recipe: Recipe, run_dir: Path, resume: bool, console: Console) -> dict[str, Any]:
    """Runs or resumes the recipe in run_dir and returns the summary.

    Errors leave what was written, and a summary that says so.
    """
    started = load_recipe(RunFolder.open(run_dir).recipe) if resume else None
    recipe, reason = resolve(_settled(recipe, started) if started else recipe)
    materials = prepare(recipe)
    if started:
        _refuse_changes(run_dir, started, recipe)
    folder = RunFolder.open(run_dir) if started else RunFolder.create(run_dir)
    with folder.locked():
        if not resume:
            replace_text(folder.recipe, resolved_yaml(recipe))
        opening = [f"run folder {folder.path}; dtype {reason}", *materials.notes]
        console.print("\n".join(opening), markup=False, soft_wrap=True)
        summary: dict[str, Any] = {"name": recipe.name, "status": "running", "versions": versions()}
        folder.write_json(folder.summary, summary)
        try:
            summary |= _run(recipe, folder, materials, console)
        except BaseException as error:
            _record_failure(folder, summary, error)
            raise
        folder.write_json(folder.summary, summary)
        write_report(folder.path)
        console.print(summary_table(folder.path, summary))
    return summary


def _run(recipe: Recipe, folder: RunFolder, materials: Materials, console: Console) -> dict[str, Any]:
    clock = StageClock()
    start = time.perf_counter()
    tokenizer = materials.tokenizer
    events = EventLog(folder.path)

    def say_restart(text: str) -> None:
        say(console, f"warning: {text}")
        events.append("restart", text)

    with System(recipe, console, say_restart) as system:
        with clock("warm_start"):
            base = base_policy(recipe, tokenizer, system, console)
        shown = trackers(recipe.monitor, folder.path, recipe.model_dump(mode="json"))
        monitor = Monitor(folder.path, console, recipe.loop.steps, shown)
        run = Run(
            recipe,
            folder,
            system,
            tokenizer,
            materials.prompts,
            materials.eval_prompts,
            monitor=monitor,
            console=console,
            alarm=FailureAlarm(recipe.reward),
            alarms=Alarms(alarm_rules(recipe)),
            events=events,
            order=materials.order,
        )
        config = system.start_training(base)
        save_config(folder.base, config, recipe.policy.dtype, base)
        system.start_engines(config, folder.base, DTYPES[recipe.policy.dtype])
        first_step = _restore(run)
        system.sync_weights()
        with clock("evaluation"):
            before = evaluated(run, 0)
        with clock("training"):
            train(run, first_step)
        with clock("evaluation"):
            after = evaluated(run, recipe.loop.steps)
        with clock("export"):
            system.save_policy(folder.policy, folder.base)
            digest = finish_export(folder, folder.policy, recipe, recipe.loop.steps)
        monitor.close()
    clock.seconds["total"] = time.perf_counter() - start
    return {
        "status": "completed",
        "steps": recipe.loop.steps,
        "evaluation": {"before": _brief(before), "after": _brief(after)},
        "mismatch": _mismatch_totals([*read_metrics(folder.path), *monitor.unwritten()]),
        "weights_digest": digest,
        "durations": clock.seconds,
        "parameters": parameter_count(config),
        "regime": regime(recipe),
    }


def say(console: Console, warning: str) -> None:
    console.print(warning, style="yellow", markup=False, soft_wrap=True)


def _restore(run: Run) -> int:
    """Loads the newest checkpoint, if there is one, and forgets what was logged after it; returns its step."""
    path = latest_checkpoint(run.folder.checkpoints)
    if path is None:
        run.monitor.truncate(0)
        return 0
    extra = run.system.load_checkpoint(path)
    step, run.cursor = int(extra["step"]), int(extra["data_cursor"])
    run.monitor.truncate(step, extra.get("unwritten_metrics", []))
    records = read_metrics(run.folder.path)
    run.alarm.restore(records)
    run.alarms.restore(records)
    if run.alarms.corrects:
        run.system.set_correction(ON_ALARM)
    run.events.step = step
    run.events.append("resume", f"resumed after step {step} from {path.name}")
    run.console.print(f"resumed after step {step} from {path}", markup=False, soft_wrap=True)
    return step


def evaluated(run: Run, step: int) -> dict[str, Any]:
    """The evaluation after `step` steps: the one on disk if a former process made it."""
    path = run.folder.evaluation(step)
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else evaluate_at(run, step)
    scores = "  ".join(f"{name[5:]} {value:.3f}" for name, value in evaluation_metrics(result).items())
    run.console.print(f"evaluation after {step} steps: {scores} on {result['problems']} held-out problems")
    return result


def _settled(recipe: Recipe, started: Recipe) -> Recipe:
    """What the recipe leaves to the machine was settled when the run started; measuring again could settle it anew."""
    dtype = started.policy.dtype if recipe.policy.dtype == "auto" else recipe.policy.dtype
    threads = recipe.trainer.threads or started.trainer.threads
    changes = {
        "policy": recipe.policy.model_copy(update={"dtype": dtype}),
        "trainer": recipe.trainer.model_copy(update={"threads": threads}),
    }
    return recipe.model_copy(update=changes)


def _refuse_changes(run_dir: Path, started: Recipe, recipe: Recipe) -> None:
    """Raises ValueError when going on with this recipe would make it another run."""
    before, now = _flat(started.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
        for key in {**before, **now}
        if before.get(key) != now.get(key) and not key.startswith(FREE_KEYS)
    ]
    corrects = [sorted(correcting(each.monitor).items()) for each in (started, recipe)]
    if corrects[0] != corrects[1]:
        changed.append("monitor.alarms: those with action correct, which changes the loss")
    if changed:
        raise ValueError(
            f"{run_dir} was started with another recipe; resume it with the same one. Different: " + "; ".join(changed)
        )


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _brief(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in evaluation.items() if key != "rows"}


def _mismatch_totals(records: Sequence[Record]) -> dict[str, int]:
    names = ("tokens_compared", "tokens_unequal", "full_vocab_rows", "full_vocab_unequal")
    return {name: int(sum(record.get(f"mismatch/{name}") or 0 for record in records)) for name in names}


def _record_failure(folder: RunFolder, summary: dict[str, Any], error: BaseException) -> None:
    status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    with contextlib.suppress(OSError):  # The error itself may be a full disk; it is the one to report.
        folder.write_json(folder.summary, summary | {"status": status, "error": f"{type(error).__name__}: {error}"})


def parameter_count(config: PolicyConfig) -> int:
    with torch.device("meta"):
        return Policy(config, torch.bfloat16).num_parameters()


def versions() -> dict[str, str]:
    names = ("lockstep-rl", "torch", "ray", "transformers", "numpy", "math-verify")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
