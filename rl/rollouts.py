"""Scored completions of a step: from engine and reward to training samples and to the run folder's records."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from policy.routing import UNKNOWN
from reward.composite import Reward
from reward.result import Reason
from rl.metrics.agreement import expert_agreement
from rl.monitor import replace_text
from rl.prompts import Prompt
from rollout.request import Completion
from trainer.batch import TrainSample


@dataclass(frozen=True)
class Scored:
    """One completion with everything the loop knows of it. One without a reward has advantage 0."""

    prompt: Prompt
    completion: Completion
    text: str
    reward: Reward
    advantage: float

    def to_sample(self) -> TrainSample:
        return TrainSample(
            input_ids=np.concatenate([self.prompt.token_ids, self.completion.token_ids]),
            prompt_length=len(self.prompt.token_ids),
            rollout_log_probs=self.completion.log_probs,
            advantage=self.advantage,
            routed_experts=self.completion.routed_experts,
            routed_weights=self.completion.routed_weights,
        )


def rollout_metrics(scored: Sequence[Scored], group_size: int) -> dict[str, float]:
    """Means of rewards and components are over the completions that have a reward, NaN where none has; fractions of
    reasons are over all of them."""
    lengths = np.array([len(each.completion.token_ids) for each in scored])
    advantages = np.array([each.advantage for each in scored]).reshape(-1, group_size)
    values = {
        **_reward_metrics([each.reward for each in scored]),
        "length/mean": lengths.mean(),
        "length/max": lengths.max(),
        "length/truncated_fraction": np.mean([each.completion.finish_reason == "length" for each in scored]),
        "policy/groups_without_signal": (advantages == 0).all(axis=1).sum(),
    }
    return {name: float(value) for name, value in values.items()}


def routing_metrics(
    scored: Sequence[Scored], routed_experts: Sequence[np.ndarray | None], replay: str
) -> dict[str, float]:
    """How often the trainer's router chose the experts that the engine recorded.

    routed_experts: the trainer's, as in `StepResult`; tokens without a record do not count. replay: what the
    recipe asks for. Raises ValueError where the engine keeps no record of it.
    """
    pairs = [
        (train, each.completion.routed_experts)
        for each, train in zip(scored, routed_experts, strict=True)
        if train is not None and each.completion.routed_experts is not None
    ]
    missing = sum(getattr(each.completion, f"routed_{replay}") is None for each in scored) if replay != "none" else 0
    if missing:
        raise ValueError(
            f"rollout.routing_replay = {replay}: {missing} of {len(scored)} completions came without the {replay} of "
            "their tokens, as this engine keeps no record of them; set rollout.routing_replay=none"
        )
    known = [(rollout != UNKNOWN).all(axis=(1, 2)) for _, rollout in pairs]
    return expert_agreement(
        [train[kept] for (train, _), kept in zip(pairs, known, strict=True)],
        [rollout[kept] for (_, rollout), kept in zip(pairs, known, strict=True)],
    )


def _reward_metrics(rewards: Sequence[Reward]) -> dict[str, float]:
    totals = _values([reward.total for reward in rewards])
    reasons = Counter(reward.reason for reward in rewards)
    components = {
        name: _values([reward.components[name] for reward in rewards if not reward.is_failure]).mean()
        for name in rewards[0].components
    }
    return {
        "reward/mean": totals.mean(),
        "reward/std": totals.std(),
        "reward/correct_fraction": components.pop("correctness"),
        **{f"reward/{name}_mean": value for name, value in components.items()},
        "reward/no_answer_fraction": np.mean([reward.verdict.extracted is None for reward in rewards]),
        "reward/verifier_failures": sum(reward.is_failure for reward in rewards),
        **{f"reward/reason/{reason}": reasons[reason] / len(rewards) for reason in Reason if reason is not Reason.OK},
    }


def _values(values: Sequence[float | None]) -> np.ndarray:
    """FP64, without what was not measured; one NaN where nothing was, as numpy warns of the mean of nothing."""
    return np.array([value for value in values if value is not None] or [np.nan])


def write_rollouts(
    path: Path,
    step: int,
    scored: Sequence[Scored],
    log_probs: Sequence[np.ndarray],
    entropies: Sequence[np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    group_size: int,
    groups: int,
) -> None:
    """The first `groups` groups of a step as JSON lines, atomically.

    A completion has `policy_versions`, one for each token, where they differ; `policy_version` is the last one.
    log_probs, entropies: the trainer's, float32 [completion length] each, in the order of `scored`.
    """
    lines = []
    for first in range(0, min(groups * group_size, len(scored)), group_size):
        members = range(first, first + group_size)
        prompt = scored[first].prompt
        record = {"step": step, "prompt_id": prompt.row.id, "prompt": prompt.text, "gold": prompt.row.answer}
        completions = [
            _completion_record(scored[index], log_probs[index], entropies[index], tokenizer) for index in members
        ]
        lines.append(json.dumps({**record, "completions": completions}))
    path.parent.mkdir(exist_ok=True)
    replace_text(path, "".join(line + "\n" for line in lines))


def _completion_record(
    each: Scored, log_probs: np.ndarray, entropies: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    versions = each.completion.policy_versions
    return {
        "text": each.text,
        "tokens": [tokenizer.decode([token]) for token in each.completion.token_ids.tolist()],
        "rollout_log_probs": each.completion.log_probs.tolist(),
        "log_probs": log_probs.tolist(),
        "entropies": [round(value, 4) for value in entropies.tolist()],
        "reward": each.reward.total,
        "components": dict(each.reward.components),
        "reason": str(each.reward.reason),
        "extracted": each.reward.verdict.extracted,
        "finish_reason": each.completion.finish_reason,
        "policy_version": int(versions[-1]),
        **({"policy_versions": versions.tolist()} if (versions != versions[-1]).any() else {}),
        "advantage": each.advantage,
    }
