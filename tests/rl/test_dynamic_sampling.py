"""Which groups a step is trained on: with signal first, filled where they are too few, and counted."""

import math

import pytest

from reward.result import Reason
from rl.dynamic_sampling import Gathered, gather
from rl.rollouts import Scored
from tests.rl.tiny import make_prompt, make_scored


def _group(name: int, signal: bool) -> list[Scored]:
    """Two completions of 3 tokens. A group without signal has them all wrong."""
    reasons = [Reason.CORRECT if signal and sample == 0 else Reason.WRONG for sample in range(2)]
    advantages = (1.0, -1.0) if signal else (0.0, 0.0)
    return [
        make_scored(make_prompt(name), sample, (5, 6, 7), reason, advantage)
        for sample, (reason, advantage) in enumerate(zip(reasons, advantages, strict=True))
    ]


def _gather(*rounds: str, wanted: int, max_rounds: int) -> tuple[Gathered, int]:
    """Rounds as words, a letter for each group: s with signal, n without. Also how many rounds were sampled."""
    names = iter(range(100))
    scored = [[each for letter in word for each in _group(next(names), letter == "s")] for word in rounds]
    left = iter(scored)
    gathered = gather(lambda: next(left), group_size=2, wanted=wanted, max_rounds=max_rounds)
    return gathered, len(scored) - len(list(left))


def _names(scored: list[Scored]) -> list[int]:
    assert [each.completion.sample for each in scored] == [0, 1] * (len(scored) // 2)
    return [each.prompt.index for each in scored[::2]]


@pytest.mark.parametrize(
    ("rounds", "max_rounds", "sampled_rounds", "kept", "skipped", "surplus"),
    [
        (["snsn"], 1, 1, [0, 1, 2, 3], 0, 0),
        (["nnnn"], 1, 1, [0, 1, 2, 3], 0, 0),
        (["ssss", "ssss"], 3, 1, [0, 1, 2, 3], 0, 0),
        (["snns", "nsns"], 3, 2, [0, 3, 5, 7], 4, 0),
        (["sssn", "nsss"], 3, 2, [0, 1, 2, 5], 2, 2),
        # Too few in the end: the first groups without signal fill the step, in their place.
        (["nsnn", "nnsn"], 2, 2, [0, 1, 2, 6], 4, 0),
        (["nnnn", "nnnn"], 2, 2, [0, 1, 2, 3], 4, 0),
        (["nnnn", "nnnn", "ssss", "ssss"], 9, 3, [8, 9, 10, 11], 8, 0),
    ],
)
def test_which_groups_are_kept(
    rounds: list[str], max_rounds: int, sampled_rounds: int, kept: list[int], skipped: int, surplus: int
) -> None:
    gathered, sampled = _gather(*rounds, wanted=4, max_rounds=max_rounds)
    assert sampled == gathered.rounds == sampled_rounds
    assert _names(gathered.kept) == kept
    assert _names(gathered.sampled) == list(range(4 * sampled_rounds))
    assert (gathered.skipped, gathered.surplus) == (skipped, surplus)


def test_metrics_are_of_all_that_was_sampled() -> None:
    """One of 16 completions is right in the first round, three in the second."""
    gathered, _ = _gather("snnnnnnn", "sssnnnnn", wanted=8, max_rounds=2)
    assert gathered.metrics() == {
        "sampling/rounds": 2.0,
        "sampling/groups_skipped": 8.0,
        "sampling/groups_surplus": 0.0,
        "sampling/reward_mean": 4 / 32,
    }
    assert gathered.tokens == 96


def test_where_no_reward_is_known_there_is_no_mean() -> None:
    failed = [make_scored(make_prompt(0), sample, (5,), Reason.TIMEOUT, 0.0) for sample in range(2)]
    gathered = gather(lambda: failed, group_size=2, wanted=1, max_rounds=1)
    assert math.isnan(gathered.metrics()["sampling/reward_mean"])
