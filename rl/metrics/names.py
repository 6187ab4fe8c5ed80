"""Which metrics a run can have, so that an alarm on a name that no run has is refused before anything starts."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from rl.metrics.mismatch import mismatch_values
from rl.metrics.pairs import Pairs
from rl.metrics.peers import PEERS, peer_metrics

_EXAMPLE = Pairs.of([np.array([-1.0, -2.0])], [np.array([-1.5, -2.0])])
_VALUES = (*mismatch_values(_EXAMPLE), "tokens_compared", "tokens_unequal")

# "*" stands for what depends on the recipe: a source of data, a component of the reward, a layer, a number of samples.
STEP_METRICS = (
    *(f"{area}/{name}" for area in ("mismatch", "mismatch_numeric", "mismatch_staleness") for name in _VALUES),
    "mismatch/full_vocab_rows",
    "mismatch/full_vocab_unequal",
    "mismatch/top1_agreement",
    "mismatch/expert_agreement/*",
    "mismatch/position/*",
    "mismatch/length/*",
    "mismatch/length_exponent",
    "mismatch/length_exponent_error",
    *(f"staleness/{name}" for name in ("mean", "max", "fraction", "mixed_fraction")),
    *(f"policy/{name}" for name in ("loss", "entropy", "clip_fraction", "approx_kl", "ratio_max", "grad_norm")),
    "policy/learning_rate",
    "policy/groups_without_signal",
    *(f"reward/{name}" for name in ("mean", "std", "correct_fraction", "no_answer_fraction", "verifier_failures")),
    *(f"reward/{name}" for name in ("failure_fraction", "failure_window_fraction", "failure_alarm")),
    "reward/*_mean",
    "reward/reason/*",
    *(f"length/{name}" for name in ("mean", "max", "truncated_fraction")),
    *(f"sampling/{name}" for name in ("rounds", "groups_skipped", "groups_surplus", "reward_mean")),
    "rollout/tokens_per_second",
    "trainer/tokens_per_second",
    "correction/*",
    "data/prompts/*",
    "eval/*",
    "memory/*",
    "time/*",
)


def unknown_metric(name: str, peers: Sequence[str]) -> str | None:
    """None for a metric that a run reporting these peers can have; else what is wrong, with the nearest right name."""
    known = (*STEP_METRICS, *peer_metrics(_EXAMPLE, peers))
    if any(fnmatchcase(name, pattern) for pattern in known):
        return None
    if owner := next((peer for peer in PEERS if name in PEERS[peer](_EXAMPLE)), None):
        return f"{name!r} is a metric of {owner}: add {owner} to monitor.names"
    exact = [each for each in known if "*" not in each]
    nearest = difflib.get_close_matches(name, exact, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "metrics.jsonl of a run has their names"
    return f"no metric {name!r}: {hint}"
