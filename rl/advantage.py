"""Group-relative advantages (GRPO, 2402.03300 Eq. 3-4): a completion is judged against the others of its prompt."""

import numpy as np

EPSILON = 1e-6


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """rewards FP64 [P, G] -> (rewards - group mean) / (group std + 1e-6), FP64 [P, G].

    Exactly 0 in a group of equal rewards. NaN stands for a completion without a reward: it counts in neither mean nor
    deviation, and its advantage is 0.
    """
    return np.array([_advantages(group) for group in rewards])


def _advantages(rewards: np.ndarray) -> np.ndarray:
    advantages = np.zeros_like(rewards)
    known = ~np.isnan(rewards)
    if len(np.unique(rewards[known])) > 1:
        advantages[known] = (rewards[known] - rewards[known].mean()) / (rewards[known].std() + EPSILON)
    return advantages
