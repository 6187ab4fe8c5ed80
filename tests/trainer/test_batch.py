"""The one shift between a row and the token it predicts, and what a sample may be."""

import numpy as np
import pytest
import torch

from trainer.batch import PackedBatch, TrainSample


def sample(input_ids: list[int], prompt_length: int, log_probs: list[float], advantage: float = 1.0) -> TrainSample:
    return TrainSample(np.array(input_ids), prompt_length, np.array(log_probs, np.float32), advantage)


def packed() -> PackedBatch:
    first = sample([10, 11, 12, 13], 2, [-0.25, -0.5], advantage=2.0)
    second = sample([20, 21, 22], 1, [-1.0, -2.0], advantage=-1.0)
    return PackedBatch.pack([first, second])


def test_every_tensor_describes_the_token_at_its_index() -> None:
    batch = packed()
    assert batch.lengths == (4, 3)
    rows = zip(batch.input_ids, batch.response_mask, batch.rollout_log_probs, batch.advantages, strict=True)
    assert [tuple(value.item() for value in row) for row in rows] == [
        (10, False, 0.0, 0.0),
        (11, False, 0.0, 0.0),
        (12, True, -0.25, 2.0),
        (13, True, -0.5, 2.0),
        (20, False, 0.0, 0.0),
        (21, True, -1.0, -1.0),
        (22, True, -2.0, -1.0),
    ]


def test_a_completion_token_is_predicted_by_the_row_before_it() -> None:
    batch = packed()
    rows, targets = batch.predictions()
    predicted_by = {
        target: int(batch.input_ids[row]) for row, target in zip(rows.tolist(), targets.tolist(), strict=True)
    }
    assert predicted_by == {12: 11, 13: 12, 21: 20, 22: 21}
    assert rows.tolist() == [1, 2, 4, 5]
    assert torch.equal(targets, batch.input_ids[batch.response_mask])


def test_split_completions_gives_each_sample_its_own_values() -> None:
    first, second = packed().split_completions(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert first.tolist() == [1.0, 2.0]
    assert second.tolist() == [3.0, 4.0]
    assert first.dtype == np.float32


def test_a_demonstration_was_certain() -> None:
    demonstration = TrainSample.demonstration(np.array([1, 2, 3]), 1)
    assert demonstration.rollout_log_probs.tolist() == [0.0, 0.0]
    assert demonstration.advantage == 1.0


@pytest.mark.parametrize(
    ("input_ids", "prompt_length", "log_probs", "advantage", "message"),
    [
        ([1, 2], 0, [-1.0, -1.0], 1.0, "prompt_length is 0 for 2 input_ids"),
        ([1, 2], 2, [], 1.0, "prompt_length is 2 for 2 input_ids"),
        ([1, 2, 3], 1, [-1.0], 1.0, "1 rollout_log_probs for a completion of 2 tokens"),
        ([1, 2], 1, [float("nan")], 1.0, "not finite"),
        ([1, 2], 1, [-1.0], float("inf"), "not finite"),
    ],
)
def test_a_wrong_sample_is_refused(
    input_ids: list[int], prompt_length: int, log_probs: list[float], advantage: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(input_ids, prompt_length, log_probs, advantage)


def test_a_cast_that_would_change_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="rollout_log_probs float64; pass int64 and float32"):
        TrainSample(np.array([1, 2]), 1, np.array([-0.1]), 1.0)
