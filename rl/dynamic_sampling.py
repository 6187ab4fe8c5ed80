"""Dynamic sampling (DAPO, 2503.14476 section 3.2): groups whose completions all earn the same teach nothing, so further
prompts are asked in their place, up to a bound.

With a bound of one round this is plain sampling: what was sampled is what is trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rl.rollouts import Scored


@dataclass(frozen=True)
class Gathered:
    """What a step sampled. `kept` is trained on: the groups of `prompts_per_step` prompts, in the order of sampling."""

    kept: list[Scored]
    sampled: list[Scored]
    rounds: int
    skipped: int
    surplus: int

    @property
    def tokens(self) -> int:
        return sum(len(each.completion.token_ids) for each in self.sampled)

    def metrics(self) -> dict[str, float]:
        """Rounds used; groups left out because they have no signal, or because the step was full; the mean reward of
        all that was sampled, where `reward/mean` is of what is trained on."""
        rewards = [each.reward.total for each in self.sampled if each.reward.total is not None]
        return {
            "sampling/rounds": float(self.rounds),
            "sampling/groups_skipped": float(self.skipped),
            "sampling/groups_surplus": float(self.surplus),
            "sampling/reward_mean": float(np.mean(rewards or [np.nan])),
        }


def gather(sample_round: Callable[[], list[Scored]], group_size: int, wanted: int, max_rounds: int) -> Gathered:
    """Samples rounds until `wanted` groups have a signal, `max_rounds` at most.

    sample_round: asks the next prompts; returns their completions, group by group. Where too few groups have a signal
    in the end, the first of those without one fill the step.
    """
    groups: list[list[Scored]] = []
    rounds = 0
    while rounds < max_rounds and sum(map(_has_signal, groups)) < wanted:
        scored = sample_round()
        groups += [scored[first : first + group_size] for first in range(0, len(scored), group_size)]
        rounds += 1
    # Sorting is stable: of each kind the first.
    by_use = sorted(range(len(groups)), key=lambda index: not _has_signal(groups[index]))
    kept, left_out = sorted(by_use[:wanted]), by_use[wanted:]
    skipped = sum(not _has_signal(groups[index]) for index in left_out)
    return Gathered(
        kept=[each for index in kept for each in groups[index]],
        sampled=[each for group in groups for each in group],
        rounds=rounds,
        skipped=skipped,
        surplus=len(left_out) - skipped,
    )


def _has_signal(group: list[Scored]) -> bool:
    return any(each.advantage != 0 for each in group)
