"""Long run folders made by the writers of a real run, so that their report can be looked at without training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from policy.tokenizer import train_tokenizer
from reward.result import Reason
from rl.config import Recipe, load_recipe, resolved_yaml
from rl.events import EventLog
from rl.metrics.agreement import expert_agreement
from rl.metrics.mismatch import mismatch_metrics
from rl.metrics.pairs import Pairs
from rl.metrics.staleness import split, staleness_metrics
from rl.monitor import Monitor
from rl.rollouts import Scored, rollout_metrics, write_rollouts
from tests.rl.page import HOSTILE
from tests.rl.tiny import make_prompt, make_scored

GROUP, GROUPS = 8, 2
WORDS = "so the remainder of 7*3+5=26 divided by 4 is \\boxed{2}\n then check: 26-24=2, hence"


def make_run(folder: Path, steps: int, aligned: bool = True, rollouts_every: int = 5, text: str = WORDS) -> Path:
    """A finished run folder. One that is not aligned is asynchronous too, so that every chart has something to show."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    recipe = _recipe(folder, aligned)
    (folder / "recipe.yaml").write_text(resolved_yaml(recipe))
    tokenizer = train_tokenizer([WORDS], 300)
    ids = np.array(tokenizer.encode(text))
    monitor, events = Monitor(folder), EventLog(folder)
    for step in range(1, steps + 1):
        events.step = step
        scored = _scored(generator, step, steps, ids, text)
        rollout = [each.completion.log_probs for each in scored]
        noise = 0.0 if aligned else 0.02
        trainer = [(each + noise * generator.standard_normal(len(each))).astype(np.float32) for each in rollout]
        monitor.log(step, _metrics(generator, step, steps, scored, trainer, aligned))
        if step == 1 or step % rollouts_every == 0:
            entropies = [np.abs(generator.standard_normal(len(each))).astype(np.float32) / 2 for each in rollout]
            path = folder / "rollouts" / f"step_{step:06d}.jsonl"
            write_rollouts(path, step, scored, trainer, entropies, tokenizer, GROUP, GROUPS)
        if step == steps // 3:
            events.append("restart", f"engine 1 died and was replaced {HOSTILE}")
        if step == 2 * steps // 3:
            events.append("alarm", "mismatch/k3 is 0.06, above 0.05")
    monitor.close()
    (folder / "summary.json").write_text(json.dumps(_summary(steps, aligned)))
    return folder


def _recipe(folder: Path, aligned: bool) -> Recipe:
    (folder / "start.yaml").write_text(
        "name: synthetic\npolicy: {path: some/policy}\ndata: {}\n"
        "loop: {steps: 500, prompts_per_step: 64, group_size: 8}\n"
    )
    changes = [] if aligned else ["ops.fast=[linear]", "loop.on_mismatch=warn", "loop.max_staleness=1"]
    return load_recipe(folder / "start.yaml", changes)


def _scored(generator: np.random.Generator, step: int, steps: int, ids: np.ndarray, text: str) -> list[Scored]:
    scored = []
    for index in range(GROUPS):
        prompt = make_prompt(index + step % 7)
        right = generator.random(GROUP) < 0.2 + 0.6 * step / steps
        for sample in range(GROUP):
            reason = Reason.CORRECT if right[sample] else Reason.WRONG
            tokens = tuple(np.resize(ids, generator.integers(20, 140)).tolist())
            made = make_scored(prompt, sample, tokens, reason, float(right[sample] - right.mean()))
            log_probs = -generator.exponential(0.3, len(tokens)).astype(np.float32)
            versions = np.where(np.arange(len(tokens)) < sample * 9, step - 2, step - 1)
            completion = replace(made.completion, log_probs=log_probs, policy_versions=np.maximum(versions, 0))
            scored.append(replace(made, text=text, completion=completion))
    return scored


def _metrics(
    generator: np.random.Generator,
    step: int,
    steps: int,
    scored: list[Scored],
    trainer: list[np.ndarray],
    aligned: bool,
) -> dict[str, float]:
    rollout = [each.completion.log_probs for each in scored]
    tokens = sum(map(len, rollout))
    experts = [generator.integers(0, 8, (len(each), 3, 2)) for each in rollout]
    moved = experts if aligned else [np.where(generator.random(e.shape) < 0.99, e, (e + 1) % 8) for e in experts]
    jitter = float(generator.normal(1, 0.1))
    times = {"rollout": 0.9, "reward": 0.1, "train": 1.1, "check": 0.05, "sync": 0.08}
    seconds = {f"time/{name}": value * jitter for name, value in times.items()}
    wait = 1.0 * jitter if aligned else 0.12 * jitter
    extra: dict[str, float] = {}
    if not aligned:
        own = [each + np.float32(0.001) for each in rollout]
        extra = split(trainer, own, rollout)
        extra |= staleness_metrics([each.completion.policy_versions for each in scored], step - 1)
    if step % 50 == 0:
        extra["eval/avg@8"] = 0.3 + 0.5 * step / steps
    return {
        **rollout_metrics(scored, GROUP),
        **mismatch_metrics(Pairs.of(trainer, rollout)),
        **expert_agreement(experts, moved),
        "mismatch/tokens_compared": tokens,
        "mismatch/tokens_unequal": 0 if aligned else tokens,
        "policy/entropy": 0.8 - 0.5 * step / steps,
        "policy/grad_norm": abs(float(generator.normal(1, 0.3))),
        "policy/clip_fraction": 0.01 * jitter,
        "rollout/tokens_per_second": 28000 * jitter,
        "trainer/tokens_per_second": 25000 / jitter,
        "memory/driver_mb": 700 + step / 10,
        "memory/trainer_mb": 900 + step / 5,
        "memory/engine_mb": 500.0,
        **seconds,
        "time/wait": wait,
        "time/step": wait + 1.25 * jitter,
        **extra,
    }


def _summary(steps: int, aligned: bool) -> dict[str, Any]:
    evaluation = {
        "avg@8": 0.5,
        "pass@8": 0.875,
        "cons@8": 0.75,
        "ci95": {"avg@8": [0.45, 0.55], "pass@8": [0.8, 0.9], "cons@8": [0.7, 0.8]},
        "problems": 200,
        "samples": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 96,
        "seed": 0,
        "length": {"all": {"mean": 41.25, "p50": 40.0, "p90": 60.0, "max": 96}, "correct": None, "incorrect": None},
        "truncated_fraction": 0.02,
        "no_answer_fraction": 0.03,
        "verifier_failures": 0,
        "by_family": {"remainder": 0.5, "counting": 0.4},
    }
    return {
        "status": "completed",
        "steps": steps,
        "evaluation": {"before": evaluation | {"avg@8": 0.3}, "after": evaluation | {"avg@8": 0.8}},
        "weights_digest": "sha256:" + "9f86d081" * 8,
        "durations": {"warm_start": 31.2, "training": 2.25 * steps, "total": 2.25 * steps + 40},
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "parameters": 1_204_224,
        "regime": "aligned" if aligned else "not aligned: fast linear; asynchronous, at most 1 versions stale",
    }
