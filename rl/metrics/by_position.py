"""Where in a completion, and in completions of which length, trainer and sampler are apart."""

import math

import numpy as np

from rl.metrics.pairs import Pairs, exact_mean, exact_sum

# First positions, and smallest lengths, of the buckets.
EDGES = (0, 16, 64, 256, 1024, 4096, 16384, 65536)


def profile_metrics(pairs: Pairs) -> dict[str, float]:
    """`position/16-63`: mean |d| of the tokens at these places of their completion. `length/16-63`: mean over the
    sequences with so many tokens of |mean of d|. Buckets without a token are left out. Then `length_metrics`."""
    absolute, places = np.abs(pairs.log_ratio), _buckets(pairs.positions)
    by_position = {
        f"position/{_label(bucket)}": exact_sum(pairs.sequence_sums(np.where(places == bucket, absolute, 0.0)))
        / int((places == bucket).sum())
        for bucket in np.unique(places)
    }
    filled = pairs.lengths > 0
    lengths, means = pairs.lengths[filled], np.abs(pairs.sequence_means(pairs.log_ratio)[filled])
    groups = _buckets(lengths)
    by_length = {f"length/{_label(bucket)}": exact_mean(means[groups == bucket]) for bucket in np.unique(groups)}
    return by_position | by_length | length_metrics(lengths, means)


def length_metrics(lengths: np.ndarray, means: np.ndarray) -> dict[str, float]:
    """How the mean difference of a sequence falls with its length T: |mean of d| ~ T^exponent.

    Independent noise of the tokens gives -0.5, the same bias on every token 0. `length_exponent` is the least squares
    slope of log |mean| over log T, `length_exponent_error` its standard error; without both a slope means nothing.
    Left out where fewer than three sequences differ at all, or all are of one length. The idea: google/tunix#2129.

    lengths: int64 [S], above 0. means: float64 [S], |mean of d|.
    """
    usable = (means > 0) & np.isfinite(means)
    x, y = np.log(lengths[usable]), np.log(means[usable])
    x = x - exact_mean(x) if len(x) else x
    spread = exact_sum(x**2)
    if len(x) < 3 or len(np.unique(lengths[usable])) == 1:
        return {}
    slope = exact_sum(x * y) / spread
    residuals = y - exact_mean(y) - slope * x
    error = math.sqrt(exact_sum(residuals**2) / (len(x) - 2) / spread)
    return {"length_exponent": slope, "length_exponent_error": error}


def _buckets(values: np.ndarray) -> np.ndarray:
    return np.searchsorted(EDGES, values, side="right") - 1


def _label(bucket: int) -> str:
    last = bucket + 1 == len(EDGES)
    return f"{EDGES[bucket]}-" if last else f"{EDGES[bucket]}-{EDGES[bucket + 1] - 1}"
