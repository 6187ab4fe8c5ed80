"""Asynchronous runs: how old the weights were that drew the tokens, and which part of a mismatch that explains."""

from collections.abc import Sequence

import numpy as np

from rl.metrics.mismatch import OF_ONE_SIDE, mismatch_values, tokens_unequal, under
from rl.metrics.pairs import Pairs

FloatArrays = Sequence[np.ndarray]


def split(
    train: FloatArrays, own_version: FloatArrays, rollout: FloatArrays, masks: FloatArrays | None = None
) -> dict[str, float]:
    """The mismatch a - b of some tokens as numeric part c - b and staleness part a - c.

    One float array [completion length] a sequence: train (a) under the weights in training, own_version (c) by the
    trainer under the weights that each token was drawn with, rollout (b) by the sampler. Returns the values of
    `mismatch_values`, but for the perplexities of one side, as `mismatch_numeric/...` and `mismatch_staleness/...`, and
    the number of tokens and of unequal ones; the two log_prob_diff_mean, and the two k1, add up to those of a against
    b. Empty without tokens.
    """
    parts = {
        "mismatch_numeric": Pairs.of(own_version, rollout, masks),
        "mismatch_staleness": Pairs.of(train, own_version, masks),
    }
    found: dict[str, float] = {}
    for area, pairs in parts.items():
        if pairs.tokens:
            counts = {"tokens_compared": pairs.tokens, "tokens_unequal": tokens_unequal(pairs)}
            values = {name: value for name, value in mismatch_values(pairs).items() if name not in OF_ONE_SIDE}
            found |= under(area, {**counts, **values})
    return found


def staleness_metrics(policy_versions: Sequence[np.ndarray], current: int) -> dict[str, float]:
    """`staleness/...`: versions by which the weights that drew a token lag behind `current`, mean and largest; the
    share of tokens that lag at all; the share of sequences drawn from more than one version. Empty without tokens.

    policy_versions: int64 [completion length] for each sequence.
    """
    filled = [versions for versions in policy_versions if len(versions)]
    if not filled:
        return {}
    lag = current - np.concatenate(filled)
    mixed = [versions.min() != versions.max() for versions in filled]
    return {
        "staleness/mean": float(lag.mean()),
        "staleness/max": float(lag.max()),
        "staleness/fraction": float((lag > 0).mean()),
        "staleness/mixed_fraction": float(np.mean(mixed)),
    }
