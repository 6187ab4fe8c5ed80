"""Two sequences whose metrics were computed by the projects' own functions, by every name they have."""

import numpy as np

from rl.metrics.pairs import Pairs

ROLLOUT = [np.array([-0.10, -1.20, -1.50, -3.00]), np.array([-0.70, -2.00])]
LOG_RATIO = [np.array([0.05, -0.20, 1.00, -1.50]), np.array([0.00, 0.30])]
TRAIN = [rollout + d for rollout, d in zip(ROLLOUT, LOG_RATIO, strict=True)]


def golden() -> Pairs:
    return Pairs.of(TRAIN, ROLLOUT)


def golden_and_masked() -> Pairs:
    """A third sequence, whose mask is empty."""
    masks = [np.ones(4, dtype=bool), np.ones(2, dtype=bool), np.zeros(3, dtype=bool)]
    far = np.array([-9.0, -9.0, -9.0])
    return Pairs.of([*TRAIN, far], [*ROLLOUT, far / 3], masks)


def printed(values: dict[str, float], *names: str) -> list[str]:
    """With the six digits that the golden values were printed with."""
    return [f"{values[name]:.6f}" for name in names]
