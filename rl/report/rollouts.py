"""Reads some rollouts of a run for the report's browser: which groups, and what is kept of each.

The page must stay small whatever the run, so groups are chosen over the whole run until a budget is spent and long
things are cut; every cut says how much it left out.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.monitor import Record, read_json_lines
from rl.page import visible

MAX_STEPS = 24
MAX_COMPLETIONS = 8  # of a group
MAX_TOKENS = 512  # of a completion
MAX_CHARACTERS = 2000  # of a prompt or completion
MAX_BYTES = 2_500_000  # of all groups, as JSON
MAX_POINTS = 3000  # tokens of the scatter

Group = dict[str, Any]
"""A group as the page's script reads it: see `_group` and `_completion`."""


@dataclass(frozen=True)
class Rollouts:
    """The groups shown, in order of step, and what was left out, in words."""

    groups: list[Group]
    note: str

    def probabilities(self) -> list[tuple[float, float]]:
        """(sampler, trainer) of evenly chosen tokens of the groups; at most `MAX_POINTS`."""
        pairs = list(_pairs(self.groups))
        return pairs[:: math.ceil(len(pairs) / MAX_POINTS) or 1]


def read_rollouts(run_dir: Path, records: Sequence[Record]) -> Rollouts:
    """Groups of at most `MAX_STEPS` steps, spread evenly over those that have rollouts, and of the step in `records`
    where trainer and sampler were furthest apart."""
    files = {int(path.stem.removeprefix("step_")): path for path in sorted((run_dir / "rollouts").glob("step_*.jsonl"))}
    chosen = _chosen_steps(list(files), records)
    lines = {step: read_json_lines(files[step]) for step in chosen}
    groups: list[Group] = []
    spent = 0
    for record in _by_turns(lines):
        group = _group(record)
        size = len(json.dumps(group))
        if spent + size <= MAX_BYTES or not groups:
            groups.append(group)
            spent += size
    recorded = sum(len(found) for found in lines.values())
    note = f"{len(groups):,} of the {recorded:,} groups recorded at {len(chosen):,} of {len(files):,} steps"
    return Rollouts(sorted(groups, key=lambda group: float(group["step"])), note)


def cut(text: str) -> str:
    """The beginning of a text, and how much was left out."""
    left_out = len(text) - MAX_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_CHARACTERS]} … [{left_out:,} more characters]"


def _chosen_steps(steps: list[int], records: Sequence[Record]) -> list[int]:
    """The first, the last and steps evenly between them."""
    if len(steps) <= MAX_STEPS:
        return steps
    chosen = {steps[round(place * (len(steps) - 1) / (MAX_STEPS - 1))] for place in range(MAX_STEPS)}
    differing = {record["step"]: record.get("mismatch/log_prob_diff_max") or 0.0 for record in records}
    furthest = max(steps, key=lambda step: differing.get(step, 0.0))
    return sorted(chosen | ({furthest} if differing.get(furthest) else set()))


def _by_turns(lines: dict[int, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The first group of every step, then the second of every step, and so on."""
    for place in range(max(map(len, lines.values()), default=0)):
        for found in lines.values():
            yield from found[place : place + 1]


def _group(record: dict[str, Any]) -> Group:
    completions = record.get("completions", [])
    return {
        "step": record["step"],
        "id": visible(str(record.get("prompt_id"))),
        "prompt": visible(cut(str(record.get("prompt", "")))),
        "gold": visible(str(record.get("gold"))),
        "count": len(completions),
        "completions": [_completion(completion) for completion in completions[:MAX_COMPLETIONS]],
    }


def _completion(record: dict[str, Any]) -> dict[str, Any]:
    """`trainer` is null where it equals `sampler` in every shown token; numbers tell any two float32 apart."""
    sampler, trainer = _numbers(record, "rollout_log_probs"), _numbers(record, "log_probs")
    tokens = record.get("tokens", [])
    components = {visible(name): _number(value) for name, value in (record.get("components") or {}).items()}
    return {
        "text": visible(cut(str(record.get("text", "")))),
        "tokens": [_token(str(token)) for token in tokens[:MAX_TOKENS]],
        "count": len(tokens),
        "sampler": sampler,
        "trainer": None if trainer == sampler else trainer,
        "entropies": _numbers(record, "entropies"),
        "versions": record.get("policy_versions", [record.get("policy_version")])[:MAX_TOKENS],
        "advantage": _number(record.get("advantage")),
        "reward": _number(record.get("reward")),
        "components": components if len(components) > 1 else {},  # alone, it is the reward
        "reason": visible(str(record.get("reason"))),
        "extracted": None if record.get("extracted") is None else visible(cut(str(record["extracted"]))),
        "finish": visible(str(record.get("finish_reason"))),
    }


def _numbers(record: dict[str, Any], name: str) -> list[float | None]:
    """What is not finite, which JSON cannot hold, is null."""
    values: list[float | None] = record.get(name, [])[:MAX_TOKENS]
    return [_number(value) for value in values]


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.9g}")


def _token(text: str) -> str:
    """Line breaks and empty tokens get a sign, so that every token can be seen and pointed at."""
    return visible(text).replace("\n", "⏎\n") or "∅"


def _pairs(groups: Sequence[Group]) -> Iterator[tuple[float, float]]:
    for completion in (completion for group in groups for completion in group["completions"]):
        sampler, trainer = completion["sampler"], completion["trainer"] or completion["sampler"]
        for ours, theirs in zip(sampler, trainer, strict=False):
            if ours is not None and theirs is not None:
                yield math.exp(ours), math.exp(theirs)
