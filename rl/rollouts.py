"""Scored completions of a step: from engine and reward to training samples and to the run folder's records."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from reward.result import RewardResult
from rl.monitor import replace_text
from rl.prompts import Prompt
from rollout.request import Completion
from trainer.batch import TrainSample


@dataclass(frozen=True)
class Scored:
    """One completion with everything the loop knows of it."""

    prompt: Prompt
    completion: Completion
    text: str
    reward: RewardResult
    advantage: float

    def to_sample(self) -> TrainSample:
        return TrainSample(
            input_ids=np.concatenate([self.prompt.token_ids, self.completion.token_ids]),
            prompt_length=len(self.prompt.token_ids),
            rollout_log_probs=self.completion.log_probs,
            advantage=self.advantage,
        )


def rollout_metrics(scored: Sequence[Scored], group_size: int) -> dict[str, float]:
    rewards = np.array([each.reward.score for each in scored])
    lengths = np.array([len(each.completion.token_ids) for each in scored])
    values = {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(),
        "reward/no_answer_fraction": np.mean([each.reward.extracted is None for each in scored]),
        "reward/verifier_failures": sum(each.reward.is_failure for each in scored),
        "length/mean": lengths.mean(),
        "length/max": lengths.max(),
        "length/truncated_fraction": np.mean([each.completion.finish_reason == "length" for each in scored]),
        "policy/groups_without_signal": (np.ptp(rewards.reshape(-1, group_size), axis=1) == 0).sum(),
    }
    return {name: float(value) for name, value in values.items()}


def write_rollouts(
    path: Path,
    step: int,
    scored: Sequence[Scored],
    log_probs: Sequence[np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    group_size: int,
    groups: int,
) -> None:
    """The first `groups` groups of a step as JSON lines, atomically.

    log_probs: the trainer's, float32 [completion length] each, in the order of `scored`.
    """
    lines = []
    for first in range(0, min(groups * group_size, len(scored)), group_size):
        members = range(first, first + group_size)
        prompt = scored[first].prompt
        record = {"step": step, "prompt_id": prompt.row.id, "prompt": prompt.text, "gold": prompt.row.answer}
        completions = [_completion_record(scored[index], log_probs[index], tokenizer) for index in members]
        lines.append(json.dumps({**record, "completions": completions}))
    path.parent.mkdir(exist_ok=True)
    replace_text(path, "".join(line + "\n" for line in lines))


def _completion_record(each: Scored, log_probs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "text": each.text,
        "tokens": [tokenizer.decode([token]) for token in each.completion.token_ids.tolist()],
        "rollout_log_probs": each.completion.log_probs.tolist(),
        "log_probs": log_probs.tolist(),
        "reward": each.reward.score,
        "reason": str(each.reward.reason),
        "extracted": each.reward.extracted,
        "finish_reason": each.completion.finish_reason,
        "policy_version": int(each.completion.policy_versions[-1]),
        "advantage": each.advantage,
    }
