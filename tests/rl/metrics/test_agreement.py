"""Agreement of choices: most likely tokens and sets of experts."""

import numpy as np
import pytest

from rl.metrics.agreement import expert_agreement, top1_agreement


def test_top1_counts_rows_and_takes_the_lowest_index_of_a_tie() -> None:
    train = [np.array([[0.0, 1.0, 1.0], [3.0, 0.0, 0.0]]), np.array([[0.0, 0.0, 1.0]])]
    rollout = [np.array([[0.0, 2.0, 1.0], [0.0, 1.0, 0.0]]), np.array([[0.0, 0.0, 1.0]])]
    assert top1_agreement(train, rollout) == {"mismatch/top1_agreement": 2 / 3}
    assert top1_agreement([], []) == {}


def test_experts_are_compared_as_sets_by_layer() -> None:
    train = [np.array([[[0, 3], [1, 2]], [[0, 1], [1, 2]]], np.int16), np.array([[[5, 6], [7, 8]]], np.int16)]
    rollout = [np.array([[[3, 0], [1, 3]], [[0, 2], [2, 1]]], np.int16), np.array([[[6, 5], [7, 8]]], np.int16)]
    assert expert_agreement(train, rollout) == {
        "mismatch/expert_agreement/layer_0": 2 / 3,
        "mismatch/expert_agreement/layer_1": 2 / 3,
    }
    assert expert_agreement([], []) == {}


def test_a_token_without_a_record_is_left_out() -> None:
    train = [np.array([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[4, 5], [2, 3]]], np.int16)]
    rollout = [np.array([[[-1, -1], [-1, -1]], [[1, 0], [-1, -1]], [[4, 6], [-1, -1]]], np.int16)]
    assert expert_agreement(train, rollout) == {"mismatch/expert_agreement/layer_0": 0.5}


def test_experts_of_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence 0: expert ids of shapes \(2, 1, 2\) and \(3, 1, 2\)"):
        expert_agreement([np.zeros((2, 1, 2), np.int16)], [np.zeros((3, 1, 2), np.int16)])
