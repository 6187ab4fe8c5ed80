"""How often a policy solves each problem of a data set: measured once, then a column that training can choose by."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from rl.data import load_problems
from rl.data_columns import Row
from rl.data_config import SYNTHETIC, DataConfig
from rl.eval_policy import EvaluationSettings, evaluate_policy
from rl.known_datasets import training_split
from rl.monitor import replace_text


def measure_pass_rates(settings: EvaluationSettings, out: Path, console: Console) -> list[dict[str, Any]]:
    """Writes the problems of `settings.data` to `out`, a .jsonl, with a `pass_rate` each; returns what it wrote.

    The evaluation is kept beside it, and goes on where a killed one stopped.
    """
    if settings.data == SYNTHETIC:
        raise ValueError("--data synthetic: give a file, such as `lockstep data make --out problems.jsonl` writes")
    if out.suffix != ".jsonl" or not out.parent.is_dir():
        raise ValueError(f"--out {out}: must be a .jsonl file in a folder that exists")
    settings = replace(settings, data=training_split(settings.data))
    rows = load_problems(DataConfig(eval=settings.data, eval_size=settings.max_problems), "eval", settings.seed)
    result = evaluate_policy(settings, out.with_suffix(".eval.json"), console)
    records = [rated_record(row, measured) for row, measured in zip(rows, result["rows"], strict=True)]
    replace_text(out, "".join(json.dumps(record) + "\n" for record in records))
    return records


def rated_record(row: Row, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Completions whose verification failed say nothing; where all did, there is no rate."""
    assert row.id == measured["id"]
    chat = {"prompt": [{"role": role, "content": content} for role, content in row.messages]} if row.messages else {}
    judged = measured["samples"] - measured["verifier_failures"]
    return {
        **row.columns,
        "id": row.id,
        "problem": row.problem,
        "answer": row.answer,
        **chat,
        "pass_rate": measured["correct"] / judged if judged else None,
        "pass_rate_samples": judged,
    }


def pass_rate_summary(records: list[dict[str, Any]], out: Path) -> str:
    rates = [record["pass_rate"] for record in records if record["pass_rate"] is not None]
    never, always = sum(rate == 0 for rate in rates), sum(rate == 1 for rate in rates)
    unknown = f", {len(records) - len(rates)} not measurable" if len(rates) < len(records) else ""
    return (
        f"{len(records)} problems in {out}: {never} never solved, {len(rates) - never - always} sometimes, "
        f"{always} always{unknown}"
    )
