"""Lockstep's own mismatch metrics: how far trainer and sampler are apart on the tokens that were sampled.

a and b are the log-probabilities of a token in the trainer and in the sampler, d = a - b, r = exp(d). Means are over
all tokens of the batch unless a line says sequences. All of it is 0 (1 for ppl_ratio, pearson and ess) where both sides
agree in every bit.
"""

import math

import numpy as np

from rl.metrics.by_position import profile_metrics
from rl.metrics.pairs import Pairs, bounded_exp, exact_mean

# The ratio's bands: within 1% and 5%, within a factor of 2, and IcePop's.
BANDS = {
    "outside_1_percent": (0.99, 1.01),
    "outside_5_percent": (0.95, 1.05),
    "outside_half_to_2": (0.5, 2.0),
    "outside_half_to_5": (0.5, 5.0),
}


# Values that describe a and b, not their difference.
OF_ONE_SIDE = ("ppl_train", "ppl_rollout")


def mismatch_metrics(pairs: Pairs) -> dict[str, float]:
    """Everything below, and the profiles by position and by length, as `mismatch/...`; empty without tokens."""
    if not pairs.tokens:
        return {}
    return under("mismatch", {**mismatch_values(pairs), **profile_metrics(pairs)})


def mismatch_values(pairs: Pairs) -> dict[str, float]:
    """The metrics of at least one token by name, without an area; NaN or infinite where a log-prob is."""
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            **_log_prob_differences(pairs),
            **_prob_differences(pairs),
            **_divergences(pairs),
            **_perplexities(pairs),
            **_ratios(pairs),
        }


def tokens_unequal(pairs: Pairs) -> int:
    """Tokens whose log-probs differ in value; NaN equals nothing."""
    return int((pairs.train != pairs.rollout).sum())


def under(area: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{area}/{name}": float(value) for name, value in values.items()}


def _log_prob_differences(pairs: Pairs) -> dict[str, float]:
    """d: mean, and standard deviation over N; |d|: mean, largest and quantiles (linear between neighbours)."""
    absolute = np.abs(pairs.log_ratio)
    quantiles = np.quantile(absolute, (0.5, 0.9, 0.99))
    return {
        "log_prob_diff_mean": pairs.mean(pairs.log_ratio),
        "log_prob_diff_std": math.sqrt(pairs.variance(pairs.log_ratio)),
        "log_prob_diff_abs_mean": pairs.mean(absolute),
        "log_prob_diff_max": absolute.max(),
        **dict(zip(("log_prob_diff_p50", "log_prob_diff_p90", "log_prob_diff_p99"), quantiles, strict=True)),
    }


def _prob_differences(pairs: Pairs) -> dict[str, float]:
    """|exp(a) - exp(b)|: mean, largest, standard deviation over N. pearson: correlation of exp(a) and exp(b)
    (MiniMax-M1, arXiv 2506.13585), 1 where they are the same array, NaN where only one of them varies."""
    train, rollout = np.exp(pairs.train), np.exp(pairs.rollout)
    difference = np.abs(train - rollout)
    return {
        "prob_diff_mean": pairs.mean(difference),
        "prob_diff_max": difference.max(),
        "prob_diff_std": math.sqrt(pairs.variance(difference)),
        "pearson": pearson(pairs, train, rollout),
    }


def pearson(pairs: Pairs, first: np.ndarray, second: np.ndarray) -> float:
    """The correlation of two arrays [N] over all tokens."""
    if np.array_equal(first, second):
        return 1.0
    scale = math.sqrt(pairs.variance(first) * pairs.variance(second))
    covariance = pairs.mean((first - pairs.mean(first)) * (second - pairs.mean(second)))
    return covariance / scale if scale else math.nan


def _divergences(pairs: Pairs) -> dict[str, float]:
    """Estimates from the sampler's tokens. k1 = -d, k2 = d^2 / 2, k3 = r - 1 - d: KL(rollout || train)
    (http://joschu.net/blog/kl-approx.html), not clamped. chi2: r^2 - 1 of tokens, and of whole sequences with
    r = exp(sum of d); here d and its sum are clamped to +-20."""
    d = pairs.log_ratio
    return {
        "k1": pairs.mean(-d),
        "k2": pairs.mean(d**2) / 2,
        "k3": pairs.mean(np.expm1(d) - d),
        "chi2_token": pairs.mean(pairs.bounded_ratio**2) - 1,
        "chi2_seq": exact_mean(bounded_exp(pairs.sequence_sums(d)[pairs.lengths > 0]) ** 2) - 1,
    }


def _perplexities(pairs: Pairs) -> dict[str, float]:
    """Means over sequences of exp(-mean of a), of exp(-mean of b), and of the first over the second. A sequence without
    tokens has none."""
    filled = pairs.lengths > 0
    train, rollout = (-pairs.sequence_means(side)[filled] for side in (pairs.train, pairs.rollout))
    return {
        "ppl_train": exact_mean(np.exp(train)),
        "ppl_rollout": exact_mean(np.exp(rollout)),
        "ppl_ratio": exact_mean(np.exp(train - rollout)),
    }


def _ratios(pairs: Pairs) -> dict[str, float]:
    """ess: effective sample size of the weights r as a share of the tokens, mean(r)^2 / mean(r^2). outside_*: share of
    tokens whose r lies outside a band; bounds belong to the band, NaN does not."""
    ratio = pairs.bounded_ratio
    outside = {name: ~((ratio >= low) & (ratio <= high)) for name, (low, high) in BANDS.items()}
    return {
        "ess": pairs.mean(ratio) ** 2 / pairs.mean(ratio**2),
        **{name: float(each.mean()) for name, each in outside.items()},
    }
