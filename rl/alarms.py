"""Alarms: metrics that must stay within bounds, and what happens when one does not.

An alarm begins to sound when its metric leaves the bounds, and again only after it has been back within them; one that
stops the run does so at every step, so that going on without a remedy stops again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rl.config import Recipe
from rl.monitor import Record
from rl.monitor_config import PROMISED, AlarmConfig
from rl.regime import unaligned_causes
from trainer.correction_config import CorrectionConfig

# The mean difference of log-probs at which the authors of IcePop call a run failed.
FAILURE_MARK = 0.05
# What the action "correct" switches on: what a run gets that does not promise equal bits.
ON_ALARM = CorrectionConfig().resolved(agrees=False)


class AlarmError(ValueError):
    """A metric left bounds for which the recipe says to stop."""


@dataclass(frozen=True)
class Alarm:
    """One that sounds now."""

    metric: str
    rule: AlarmConfig
    text: str

    @property
    def action(self) -> str:
        return self.rule.action


def alarm_rules(recipe: Recipe) -> dict[str, AlarmConfig]:
    """Those of the recipe and, unless it says otherwise, the default ones, by metric.

    Where the run promises equal bits, any unequal one sounds, with loop.on_mismatch as action. Where it does not, or
    policies may be stale, k3 and the mean difference sound at `FAILURE_MARK`.
    """
    aligned, action = not unaligned_causes(recipe), recipe.loop.on_mismatch
    rules: dict[str, AlarmConfig | None] = {}
    if aligned:
        rules |= dict.fromkeys(PROMISED, AlarmConfig(above=0, action=action))
    if not aligned or recipe.loop.max_staleness:
        far = AlarmConfig(above=FAILURE_MARK)
        rules |= dict.fromkeys(("mismatch/k3", "mismatch/log_prob_diff_abs_mean"), far)
    rules |= recipe.monitor.alarms
    return {metric: rule for metric, rule in rules.items() if rule is not None}


class Alarms:
    """Watches the metrics of one run.

    rules: by metric. A metric may be missing from a step, which then says nothing of it.
    """

    def __init__(self, rules: Mapping[str, AlarmConfig]) -> None:
        self._rules = dict(rules)
        self._sounding: set[str] = set()
        self._corrects = False

    @property
    def corrects(self) -> bool:
        """Whether an alarm has asked for correction, in this process or a former one."""
        return self._corrects

    def metrics(self) -> dict[str, float]:
        """`monitor/alarms`: how many sound now."""
        return {"monitor/alarms": float(len(self._sounding))}

    def restore(self, records: Sequence[Record]) -> None:
        """Continues where a former process stopped, from the steps it recorded."""
        for record in records:
            # What was not finite is recorded as None.
            self.observe({name: math.nan if value is None else value for name, value in record.items()})

    def observe(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """Those that begin to sound with these metrics, which may be a part of a step's."""
        begun = []
        for metric, rule in self._rules.items():
            if metric not in metrics:
                continue
            problem = _problem(metrics[metric], rule)
            if problem is None:
                self._sounding.discard(metric)
            elif metric not in self._sounding or rule.action == "stop":
                self._sounding.add(metric)
                begun.append(Alarm(metric, rule, f"{metric} is {metrics[metric]:.4g}, {problem}"))
        self._corrects |= any(alarm.action == "correct" for alarm in begun)
        return begun

    def unseen(self, metrics: Mapping[str, float]) -> list[str]:
        """Watched metrics that these do not have."""
        return [metric for metric in self._rules if metric not in metrics]


def _problem(value: float, rule: AlarmConfig) -> str | None:
    if not math.isfinite(value):
        return "which is no finite number"
    if rule.above is not None and value > rule.above:
        return f"above {rule.above:g}"
    if rule.below is not None and value < rule.below:
        return f"below {rule.below:g}"
    return None
