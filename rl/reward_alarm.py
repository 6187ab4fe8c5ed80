"""Watches the share of completions whose reward failed: says when it rises, and stops a run that it spoils.

A verifier that fails is not a policy that does. Such a completion is left out of its group's baseline and gets no
advantage, so a few cost nothing; many would teach the policy from what is left.
"""

from collections import Counter, deque
from collections.abc import Sequence

from reward.composite import Reward
from reward.config import RewardConfig
from rl.monitor import Record

# A smaller share is not worth a warning.
WARNING_FLOOR = 0.01


class RewardFailureError(ValueError):
    """So many rewards failed that the recipe says to stop."""


class FailureAlarm:
    """The share of failures over the last `reward.failure_window` steps; steps not yet taken count as free of them.

    One warning a rise: at 1%, then whenever the share has doubled since the last one. When it has fallen by more than
    half, it is from there that it has to double.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._fractions: deque[float] = deque(maxlen=config.failure_window)
        self._warned_at = 0.0

    @property
    def share(self) -> float:
        return sum(self._fractions) / self._config.failure_window

    def metrics(self) -> dict[str, float]:
        """The share of failures in the step observed last, which `restore` reads, and over the window."""
        return {"reward/failure_fraction": self._fractions[-1], "reward/failure_window_fraction": self.share}

    def restore(self, records: Sequence[Record]) -> None:
        """Continues where a former process stopped, from the steps it recorded."""
        for record in records:
            self._add(record.get("reward/failure_fraction") or 0.0)

    def observe(self, step: int, rewards: Sequence[Reward]) -> str | None:
        """Takes in one step; returns a warning if the share has risen.

        Raises RewardFailureError if it is beyond reward.max_failure_fraction.
        """
        failures = [reward for reward in rewards if reward.is_failure]
        rising = self._add(len(failures) / len(rewards))
        if self.share > self._config.max_failure_fraction:
            raise RewardFailureError(self._too_many(step, failures))
        return f"rewards fail more often: {self._described(step, failures)}" if rising else None

    def _add(self, fraction: float) -> bool:
        """Whether the share has risen so far that it is worth saying."""
        self._fractions.append(fraction)
        if self.share < self._warned_at / 2:
            self._warned_at = self.share
        rising = self.share >= max(WARNING_FLOOR, 2 * self._warned_at)
        if rising:
            self._warned_at = self.share
        return rising

    def _too_many(self, step: int, failures: Sequence[Reward]) -> str:
        return (
            f"too many rewards fail: {self._described(step, failures)}. That is more than reward.max_failure_fraction "
            f"= {self._config.max_failure_fraction}. No weight was changed by this step. Repair what fails and "
            "start a new run, or go on with --resume and a larger reward.max_failure_fraction"
        )

    def _described(self, step: int, failures: Sequence[Reward]) -> str:
        reasons = Counter(str(reward.reason) for reward in failures)
        counted = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "no failure"
        messages = [reward.message for reward in failures if reward.message]
        said = f"; the first says: {messages[0]}" if messages else ""
        return (
            f"{self.share:.1%} of the completions of the last {self._config.failure_window} steps have no reward, in "
            f"step {step}: {counted}{said}"
        )
