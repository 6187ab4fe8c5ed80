"""Group-relative advantages by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.advantage import group_advantages


def test_by_hand() -> None:
    """Mean 0.25 and standard deviation sqrt(3)/4; then two and two."""
    advantages = group_advantages(np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]]))
    assert advantages[0] == pytest.approx([3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)], rel=1e-5)
    assert advantages[1].tolist() == [0.5 / 0.500001, -0.5 / 0.500001, 0.5 / 0.500001, -0.5 / 0.500001]


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_equal_rewards_give_exactly_nothing(reward: float) -> None:
    """The mean of seven 0.1 is not 0.1 in floating point; the advantage must be 0 all the same."""
    assert group_advantages(np.full((1, 7), reward)).tolist() == [[0.0] * 7]


def test_a_completion_without_a_reward_is_left_out() -> None:
    """Without it [1, 0, 0] remain: mean 1/3 and standard deviation sqrt(2)/3, not those of [1, 0, 0, 0]."""
    advantages = group_advantages(np.array([[1.0, np.nan, 0.0, 0.0]]))[0]
    assert advantages.tolist() == [pytest.approx(2**0.5, rel=1e-5), 0.0, *[pytest.approx(-(0.5**0.5), rel=1e-5)] * 2]


@pytest.mark.parametrize("rest", [[np.nan] * 3, [1.0, np.nan, np.nan], [1.0, 1.0, np.nan]])
def test_what_is_left_of_a_group_may_teach_nothing(rest: list[float]) -> None:
    assert group_advantages(np.array([[np.nan, *rest]])).tolist() == [[0.0] * 4]


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=12), st.integers(1, 4))
def test_completions_without_a_reward_change_nothing_for_the_others(rewards: list[float], failed: int) -> None:
    alone = group_advantages(np.array([rewards]))[0]
    among = group_advantages(np.array([[np.nan] * failed + rewards]))[0]
    assert np.array_equal(among, [0.0] * failed + alone.tolist())


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16))
def test_sum_is_zero_and_order_is_that_of_the_rewards(rewards: list[float]) -> None:
    advantages = group_advantages(np.array([rewards]))[0]
    assert advantages.sum() == pytest.approx(0.0, abs=1e-9)
    assert all(value > 0 for value, reward in zip(advantages, rewards, strict=True) if reward > np.mean(rewards))
