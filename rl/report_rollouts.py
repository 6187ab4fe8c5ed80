"""Reads a few rollouts of a run for the report: which groups, how much of each, and what is shown of a token.

The page must stay small whatever the run, so long things are cut; every cut says how much it left out.
"""

import json
import math
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rl.monitor import read_json_lines

MAX_GROUPS = 8
MAX_COMPLETIONS = 8  # of a group
MAX_TOKENS = 256  # of a completion
MAX_CHARACTERS = 2000  # of a prompt or completion

SHADE_BOUNDS = (0.99, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01)
"""A token's shade is the number of these bounds its probability lies below: 0 for a sure token, 7 for a surprise."""


@dataclass(frozen=True)
class Token:
    """A token of a completion as shown: its text, its shade, and the log-probabilities in its tooltip."""

    text: str
    shade: int
    unequal: bool
    tooltip: str


@dataclass(frozen=True)
class Completion:
    """A completion as shown. `record` is its entry in the rollouts file."""

    record: dict[str, Any]
    text: str
    tokens: list[Token]
    token_count: int


@dataclass(frozen=True)
class Group:
    """A group as shown: its prompt and the first of its completions."""

    record: dict[str, Any]
    prompt: str
    completions: list[Completion]
    completion_count: int


def read_groups(run_dir: Path) -> list[Group]:
    """The first groups recorded at the first, the middle and the last step that have rollouts; at most `MAX_GROUPS`."""
    files = sorted((run_dir / "rollouts").glob("step_*.jsonl"))
    chosen = files if len(files) <= 3 else [files[0], files[len(files) // 2], files[-1]]
    groups: list[Group] = []
    for path in chosen:
        groups.extend(_group(record) for record in read_json_lines(path)[: MAX_GROUPS // len(chosen)])
    return groups


def _group(record: dict[str, Any]) -> Group:
    completions = record.get("completions", [])
    shown = [_completion(completion) for completion in completions[:MAX_COMPLETIONS]]
    return Group(record, cut(str(record.get("prompt", ""))), shown, len(completions))


def _completion(record: dict[str, Any]) -> Completion:
    tokens = record.get("tokens", [])
    columns = (tokens, record.get("rollout_log_probs", []), record.get("log_probs", []))
    rows = zip_longest(*(column[:MAX_TOKENS] for column in columns))
    shown = [_token(position, *row) for position, row in enumerate(rows)]
    return Completion(record, cut(str(record.get("text", ""))), shown, len(tokens))


def _token(position: int, text: str | None, rollout: float | None, trainer: float | None) -> Token:
    probability = None if rollout is None else math.exp(rollout)
    difference = None if rollout is None or trainer is None else trainer - rollout
    tooltip = (
        f"token {position}: {json.dumps(text, ensure_ascii=False)}\n"
        f"rollout log-prob {_exact(rollout)} (probability {_exact(probability, digits=4)})\n"
        f"trainer log-prob {_exact(trainer)}\n"
        f"difference {_exact(difference)}"
    )
    shade = 0 if probability is None else sum(probability < bound for bound in SHADE_BOUNDS)
    return Token(_visible(text or ""), shade, difference not in (None, 0.0), tooltip)


def _exact(value: float | None, digits: int = 9) -> str:
    """By default the nine digits that tell any two float32 apart."""
    return "not recorded" if value is None else f"{value:.{digits}g}"


def _visible(text: str) -> str:
    """Line breaks and empty tokens get a sign, so that every token can be seen and pointed at."""
    return text.replace("\n", "⏎\n") or "∅"


def cut(text: str) -> str:
    """The beginning of a text, and how much was left out."""
    left_out = len(text) - MAX_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_CHARACTERS]} … [{left_out:,} more characters]"
