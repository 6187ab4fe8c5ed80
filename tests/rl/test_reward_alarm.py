"""The alarm: when it warns, when it stops a run, and that a resumed run is where it was."""

import pytest

from reward.composite import Reward
from reward.config import RewardConfig
from reward.result import Reason
from rl.reward_alarm import FailureAlarm, RewardFailureError
from tests.rl.tiny import make_reward

CONFIG = RewardConfig(max_failure_fraction=0.2, failure_window=4)
RIGHT = make_reward(Reason.CORRECT)
TIMEOUT = make_reward(Reason.TIMEOUT)


def step_of(failures: int) -> list[Reward]:
    """A step of 100 completions."""
    return [TIMEOUT] * failures + [RIGHT] * (100 - failures)


def warned(failures: list[int], config: RewardConfig = CONFIG) -> list[int]:
    """The steps, from 1, in which an alarm warns."""
    alarm = FailureAlarm(config)
    return [step for step, count in enumerate(failures, start=1) if alarm.observe(step, step_of(count))]


@pytest.mark.parametrize(
    ("failures", "steps"),
    [
        ([0, 0, 0], []),
        ([3, 0, 0, 0, 0], []),  # 0.75% of the window
        ([4, 0, 0, 0, 0], [1]),  # 1%
        ([4, 3, 1], [1, 3]),  # 1%, 1.75%, 2%
        ([8, 8, 8, 8, 8, 8], [1, 2, 4]),  # 2%, 4%, 6%, 8%, 8%, 8%
        ([8, 0, 0, 0, 0, 0, 8], [1, 7]),  # a second rise
        ([8, 0, 0, 0, 4, 0, 4], [1]),  # 2%, ..., 1%, 1%, 2%: it had not fallen by more than half
        ([8, 0, 0, 0, 3, 0, 3], [1, 7]),  # 2%, ..., 0.75%, 0.75%, 1.5%
    ],
)
def test_one_warning_a_rise(failures: list[int], steps: list[int]) -> None:
    assert warned(failures) == steps


def test_a_warning_counts_the_reasons_and_quotes_the_first_message() -> None:
    rewards = [
        make_reward(Reason.USER_ERROR, "KeyError: 'x' (mine.py, line 3)"),
        TIMEOUT,
        make_reward(Reason.USER_ERROR, "later"),
        *[RIGHT] * 7,
    ]
    assert FailureAlarm(CONFIG).observe(5, rewards) == (
        "rewards fail more often: 7.5% of the completions of the last 4 steps have no reward, in step 5: user_error 2, "
        "timeout 1; the first says: KeyError: 'x' (mine.py, line 3)"
    )


def test_beyond_the_limit_the_run_is_stopped() -> None:
    """30, 30 and 20 of 100 in a window of four steps are just 20%, the limit; one more is beyond it."""
    alarm = FailureAlarm(CONFIG)
    for step, failures in enumerate((30, 30, 20, 0), start=1):
        alarm.observe(step, step_of(failures))
    assert alarm.share == 0.2
    with pytest.raises(RewardFailureError) as error:
        alarm.observe(5, step_of(31))
    assert str(error.value) == (
        "too many rewards fail: 20.2% of the completions of the last 4 steps have no reward, in step 5: timeout 31. "
        "That is more than reward.max_failure_fraction = 0.2. No weight was changed by this step. Repair what fails "
        "and start a new run, or go on with --resume and a larger reward.max_failure_fraction"
    )


def test_a_verifier_that_fails_always_is_noticed_in_the_first_step() -> None:
    with pytest.raises(RewardFailureError, match="in step 1: timeout 100"):
        FailureAlarm(CONFIG).observe(1, step_of(100))
    with pytest.raises(RewardFailureError):
        FailureAlarm(RewardConfig()).observe(1, step_of(100))


def test_a_limit_of_one_never_stops_and_a_limit_of_zero_always() -> None:
    alarm = FailureAlarm(RewardConfig(max_failure_fraction=1.0, failure_window=2))
    for step in range(1, 5):
        alarm.observe(step, step_of(100))
    assert alarm.share == 1.0
    strict = FailureAlarm(RewardConfig(max_failure_fraction=0.0))
    assert strict.observe(1, step_of(0)) is None
    with pytest.raises(RewardFailureError):
        strict.observe(2, step_of(1))


def test_restored_from_the_record_it_is_where_it_was() -> None:
    failures = [8, 0, 5, 16, 2, 0, 0, 0, 3, 5]
    whole, cut = FailureAlarm(CONFIG), FailureAlarm(CONFIG)
    records = []
    for step, count in enumerate(failures[:5], start=1):
        whole.observe(step, step_of(count))
        records.append({"step": float(step), **whole.metrics()})
    cut.restore(records)
    assert cut.metrics() == whole.metrics()
    for step, count in enumerate(failures[5:], start=6):
        assert cut.observe(step, step_of(count)) == whole.observe(step, step_of(count))
        assert cut.metrics() == whole.metrics()
