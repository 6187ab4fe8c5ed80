"""Agreement of choices: the most likely token, and the experts that a token was sent to."""

from collections.abc import Sequence

import numpy as np


def top1_agreement(train: Sequence[np.ndarray], rollout: Sequence[np.ndarray]) -> dict[str, float]:
    """`mismatch/top1_agreement`: the share of rows whose most likely token is the same; ties go to the lowest index.

    train, rollout: float [n, V] for each sequence that was compared over the whole vocabulary. Empty without rows.
    """
    equal = [np.argmax(a, axis=1) == np.argmax(b, axis=1) for a, b in zip(train, rollout, strict=True)]
    found = np.concatenate([np.zeros(0, dtype=bool), *equal])
    return {"mismatch/top1_agreement": float(found.mean())} if len(found) else {}


def expert_agreement(train: Sequence[np.ndarray], rollout: Sequence[np.ndarray]) -> dict[str, float]:
    """`mismatch/expert_agreement/layer_N`: the share of tokens that both sides sent to the same set of experts.

    train, rollout: integers [tokens, MoE layers, experts of a token] for each sequence, the experts in any order; below
    0 where a side has no record of a token, which is then left out. N counts MoE layers from 0; a layer without any
    record is left out. Raises ValueError when shapes disagree.
    """
    for index, (a, b) in enumerate(zip(train, rollout, strict=True)):
        if a.shape != b.shape:
            raise ValueError(
                f"sequence {index}: expert ids of shapes {a.shape} and {b.shape}; both sides must describe "
                "[tokens, MoE layers, experts of a token] of the same tokens"
            )
    if not train:
        return {}
    first, second = (np.sort(np.concatenate(list(side))) for side in (train, rollout))
    equal = (first == second).all(axis=-1)
    known = (first[..., 0] >= 0) & (second[..., 0] >= 0)
    return {
        f"mismatch/expert_agreement/layer_{layer}": float(equal[known[:, layer], layer].mean())
        for layer in range(known.shape[1])
        if known[:, layer].any()
    }
