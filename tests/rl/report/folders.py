"""Run folders as small as a test needs them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl.monitor import Record
from rl.report import write_report
from tests.rl.page import Page


def evaluation(score: float) -> dict[str, Any]:
    length = {"mean": 41.25, "p50": 40.0, "p90": 60.0, "max": 96}
    return {
        "avg@8": score,
        "pass@8": 0.875,
        "cons@8": 0.75,
        "ci95": {"avg@8": [score - 0.05, score + 0.05], "pass@8": [0.8, 0.9], "cons@8": [0.7, 0.8]},
        "problems": 200,
        "samples": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 96,
        "seed": 0,
        "length": {"all": length, "correct": length, "incorrect": None},
        "truncated_fraction": 0.02,
        "no_answer_fraction": 0.03,
        "verifier_failures": 0,
        "by_family": {"addition": score},
    }


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "status": "completed",
        "steps": 40,
        "evaluation": {"before": evaluation(0.125), "after": evaluation(0.625)},
        "mismatch": {"tokens_compared": 940440, "tokens_unequal": 0, "full_vocab_rows": 80, "full_vocab_unequal": 0},
        "weights_digest": "sha256:9f86d081",
        "durations": {"warm_start": 31.2, "training": 144.0, "total": 188.0},
        "versions": {"torch": "2.13.0"},
        "parameters": 1204224,
        "regime": "aligned",
        **changes,
    }


def metrics(step: int) -> Record:
    return {
        "step": step,
        "reward/mean": 0.5,
        "length/mean": 40.0,
        "length/max": 96.0,
        "policy/entropy": 0.5,
        "policy/grad_norm": 0.25,
        "mismatch/tokens_compared": 100,
        "mismatch/tokens_unequal": 0,
        "mismatch/log_prob_diff_max": 0.0,
        "time/rollout": 2.0,
        "time/train": 1.0,
        "rollout/tokens_per_second": 9000.0,
    }


def group(step: int, completions: int = 2, tokens: int = 3, text: Callable[[str], str] = str) -> dict[str, Any]:
    completion = {
        "text": text("the sum is 7"),
        "tokens": [text(" seven")] * tokens,
        "rollout_log_probs": [-0.5] * tokens,
        "log_probs": [-0.5] * tokens,
        "reward": 1.0,
        "reason": text("correct"),
        "extracted": text("7"),
        "finish_reason": text("stop"),
        "advantage": 0.5,
    }
    return {
        "step": step,
        "prompt_id": text("add-1"),
        "prompt": text("3 + 4?"),
        "gold": text("7"),
        "completions": [completion] * completions,
    }


def run_folder(run_dir: Path, **files: Any) -> Path:
    """A run folder with a recipe and, where given, `summary`, `metrics` and `rollouts` (groups by step)."""
    (run_dir / "rollouts").mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(files.get("recipe", "name: quickstart\nseed: 7\n"))
    if "summary" in files:
        (run_dir / "summary.json").write_text(json.dumps(files["summary"]))
    if "metrics" in files:
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in files["metrics"]))
    for step, groups in files.get("rollouts", {}).items():
        path = run_dir / "rollouts" / f"step_{step:06d}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in groups))
    return run_dir


def full_run(run_dir: Path, text: Callable[[str], str] = str) -> Path:
    """A run with something in every part of the page, each text changed by `text`."""
    found = summary(
        status=text("completed"),
        weights_digest=text("sha256:9f86d081"),
        regime=text("aligned"),
        versions={text("torch"): text("2.13.0")},
        durations={text("training"): 144.0, "total": 188.0},
    )
    for stage in found["evaluation"].values():
        stage["by_family"] = {text("addition"): 0.5}
    return run_folder(
        run_dir,
        recipe=f"name: {json.dumps(text('quickstart'))}\n",
        summary=found,
        metrics=[metrics(step) for step in range(1, 41)],
        rollouts={1: [group(1, text=text)], 40: [group(40, text=text)]},
    )


def report(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))
