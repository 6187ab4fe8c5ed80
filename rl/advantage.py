"""Group-relative advantages (GRPO, 2402.03300 Eq. 3-4): a completion is judged against the others of its prompt."""

import numpy as np

EPSILON = 1e-6


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """rewards FP64 [P, G] -> (rewards - group mean) / (group std + 1e-6), FP64 [P, G].

    Exactly 0 in a group of equal rewards.
    """
    centred = rewards - rewards.mean(1, keepdims=True)
    centred[np.ptp(rewards, axis=1) == 0] = 0.0
    return np.asarray(centred / (rewards.std(1, keepdims=True) + EPSILON))
