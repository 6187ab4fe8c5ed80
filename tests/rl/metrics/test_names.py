"""Which metrics an alarm may watch: every one that a run records, and none that it cannot have."""

from pathlib import Path

import pytest

from rl.metrics.names import unknown_metric
from rl.monitor import read_metrics


def test_every_metric_of_a_run_is_known(finished_run: Path) -> None:
    names = {name for record in read_metrics(finished_run) for name in record} - {"step", "monitor/alarms"}
    assert len(names) > 60
    assert [name for name in names if unknown_metric(name, ()) is not None] == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mismatch/k33", "no metric 'mismatch/k33': did you mean 'mismatch/k3'?"),
        (
            "mismatch/logprob_diff_max",
            "no metric 'mismatch/logprob_diff_max': did you mean 'mismatch/log_prob_diff_max'?",
        ),
        ("reward/men", "no metric 'reward/men': did you mean 'reward/mean'?"),
        ("rollout_corr/kl", "'rollout_corr/kl' is a metric of verl: add verl to monitor.names"),
        ("x", "no metric 'x': metrics.jsonl of a run has their names"),
    ],
)
def test_an_unknown_metric_is_answered_with_the_nearest(name: str, said: str) -> None:
    assert unknown_metric(name, ()) == said


def test_peers_of_the_recipe_are_known() -> None:
    assert unknown_metric("rollout_corr/kl", ("verl",)) is None
    assert unknown_metric("eval/avg@8", ()) is None
