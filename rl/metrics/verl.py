"""verl's mismatch metrics by verl's names (prefixes `rollout_corr/` and `training/`) and definitions, traps included.

Source: verl, verl/trainer/ppo/rollout_corr_helper.py and verl/utils/debug/metrics.py. d is log pi_train of a token
minus its log pi_rollout. MM is the sum over the tokens that the mask leaves, over their number + 1e-8. A sequence whose
mask is empty still counts in the means over sequences: with perplexity 1, log-ratio 0 and weight 0.

verl published `rollout_is_*` twice under the same names. Since August 2026 they describe the weights as applied
(truncated or masked); in January 2026 mean, extremes and `seq_*` described the raw weights, and std and ess weights
clamped to [1/upper, upper].
"""

from dataclasses import dataclass

import numpy as np

from rl.metrics.mismatch import pearson, under
from rl.metrics.pairs import Pairs, bounded_exp, exact_mean, exact_sum


@dataclass(frozen=True)
class Weighting:
    """verl's rollout_is settings. level: token or sequence. upper: the cap of truncated importance sampling, or with
    `lower` IcePop's band, outside which a weight is 0. In sequence level a token has its sequence's weight."""

    level: str = "token"
    upper: float = 2.0
    lower: float | None = None
    batch_normalize: bool = False

    @property
    def floor(self) -> float:
        return 1 / self.upper if self.lower is None else self.lower

    def log_weights(self, pairs: Pairs) -> np.ndarray:
        """[N] or, in sequence level, [S]; not clamped."""
        return pairs.log_ratio if self.level == "token" else pairs.sequence_sums(pairs.log_ratio)

    def raw(self, pairs: Pairs) -> np.ndarray:
        """[N]"""
        weights = bounded_exp(self.log_weights(pairs))
        return weights if self.level == "token" else np.repeat(weights, pairs.lengths)

    def applied(self, pairs: Pairs) -> np.ndarray:
        """[N], before batch normalisation."""
        raw = self.raw(pairs)
        if self.lower is None:
            return np.minimum(raw, self.upper)
        return np.where((raw >= self.lower) & (raw <= self.upper), raw, 0.0)

    def norm_factor(self, pairs: Pairs) -> float:
        """The mean applied weight that batch normalisation divides by: of tokens, or of sequences that have tokens."""
        applied = self.applied(pairs)
        if self.level == "token":
            return _masked_mean(pairs, applied)
        return exact_mean(pairs.sequence_means(applied)[pairs.lengths > 0])


def verl(pairs: Pairs, weighting: Weighting = Weighting()) -> dict[str, float]:
    """Every metric of a run with these weights, as verl names and computes it since August 2026."""
    applied = weighting.applied(pairs)
    clamped = np.clip(applied, 0, weighting.upper)
    found = _off_policy(pairs) | _weights(pairs, weighting, applied, clamped)
    if weighting.lower is not None:
        outside = (weighting.raw(pairs) < weighting.lower) | (weighting.raw(pairs) > weighting.upper)
        found["rollout_is_oob_ratio"] = _masked_mean(pairs, outside.astype(float))
    return under("rollout_corr", found) | verl_debug(pairs)


def verl_2026_01(pairs: Pairs, weighting: Weighting = Weighting()) -> dict[str, float]:
    """As verl computed them in January 2026."""
    assert weighting.lower is None, "IcePop came later"
    raw = weighting.raw(pairs)
    clamped = np.clip(raw, weighting.floor, weighting.upper)
    return under("rollout_corr", _off_policy(pairs) | _weights(pairs, weighting, raw, clamped)) | verl_debug(pairs)


def verl_debug(pairs: Pairs) -> dict[str, float]:
    """`training/rollout_probs_diff_*`: of probabilities, though verl's comments say log-probs; std unbiased. NaN, as in
    verl, where the mask leaves nothing."""
    train, rollout = np.exp(pairs.train), np.exp(pairs.rollout)
    difference = np.abs(train - rollout)
    return {
        "training/rollout_probs_diff_valid": 1.0,
        "training/rollout_probs_diff_max": float(difference.max(initial=0.0)) if pairs.tokens else np.nan,
        "training/rollout_probs_diff_mean": pairs.mean(difference),
        "training/rollout_probs_diff_std": pairs.unbiased_std(difference),
        "training/rollout_actor_probs_pearson_corr": pearson(pairs, train, rollout) if pairs.tokens else np.nan,
    }


def verl_rejection(pairs: Pairs, options: str, thresholds: str) -> tuple[np.ndarray, dict[str, float]]:
    """verl's rejection sampling (rollout_rs, since August 2026): the tokens kept, bool [N], and the shares masked.

    options: comma list of {token,seq_sum,seq_mean,seq_max}_{k1,k2,k3}; all must pass. thresholds: "L_U" or "U" each.
    k1 = -d, d clamped to +-20, must lie in [log L, log U], L = 1/U where only U is given: it bounds pi_rollout over
    pi_train. k2 = d^2/2 and k3 = exp(d) - 1 - d must not exceed U. A sequence counts as masked when a token is.
    """
    keep = np.ones(pairs.tokens, dtype=bool)
    for option, threshold in zip(options.split(","), thresholds.split(","), strict=True):
        keep &= _within(pairs, option.strip(), threshold.strip())
    masked = (~keep).astype(float)
    fractions = {
        "rollout_corr/rollout_rs_masked_fraction": _masked_mean(pairs, masked),
        "rollout_corr/rollout_rs_seq_masked_fraction": float((pairs.sequence_sums(masked) > 0).mean()),
    }
    return keep, fractions


def _within(pairs: Pairs, option: str, threshold: str) -> np.ndarray:
    level, _, estimator = option.rpartition("_")
    d, bounds = pairs.log_ratio, [float(bound) for bound in threshold.split("_")]
    values = {"k1": -np.clip(d, -20, 20), "k2": d**2 / 2, "k3": np.exp(d) - 1 - d}[estimator]
    if level == "seq_max":
        groups = np.split(values, np.cumsum(pairs.lengths)[:-1])
        values = np.repeat([group.max(initial=-np.inf) for group in groups], pairs.lengths)
    elif level != "token":
        reduce = {"seq_sum": pairs.sequence_sums, "seq_mean": pairs.sequence_means}[level]
        values = np.repeat(reduce(values), pairs.lengths)
    if estimator != "k1":
        return values <= bounds[-1]
    low = bounds[0] if len(bounds) > 1 else 1 / bounds[0]
    return (values >= np.log(low)) & (values <= np.log(bounds[-1]))


def _off_policy(pairs: Pairs) -> dict[str, float]:
    d = pairs.log_ratio
    train, rollout = -pairs.sequence_means(pairs.train), -pairs.sequence_means(pairs.rollout)
    gap = train - rollout
    return {
        "training_ppl": exact_mean(np.exp(train)),
        "training_log_ppl": exact_mean(train),
        "rollout_ppl": exact_mean(np.exp(rollout)),
        "rollout_log_ppl": exact_mean(rollout),
        "kl": _masked_mean(pairs, -d),
        "k3_kl": _masked_mean(pairs, np.exp(d) - d - 1),
        "log_ppl_diff": exact_mean(gap),
        "log_ppl_abs_diff": exact_mean(np.abs(gap)),
        "log_ppl_diff_max": gap.max(),
        "log_ppl_diff_min": gap.min(),
        "ppl_ratio": exact_mean(np.exp(gap)),
        "chi2_token": _masked_mean(pairs, pairs.bounded_ratio**2) - 1,
        "chi2_seq": exact_mean(bounded_exp(pairs.sequence_sums(d)) ** 2) - 1,
    }


def _weights(pairs: Pairs, weighting: Weighting, weights: np.ndarray, clamped: np.ndarray) -> dict[str, float]:
    """weights [N]: what mean, extremes and seq_* describe. clamped [N]: what std and ess describe."""
    mean = _masked_mean(pairs, clamped)
    variance = _masked_mean(pairs, clamped**2) - mean**2
    found = {
        "rollout_is_mean": _masked_mean(pairs, weights),
        **_extremes(pairs, weighting, weights),
        "rollout_is_std": np.sqrt(max(variance, 0.0)) if pairs.tokens > 1 else 0.0,
        "rollout_is_eff_sample_size": 1 / _masked_mean(pairs, (clamped / (mean + 1e-8)) ** 2),
        **_sequence_weights(pairs, weighting, weights),
    }
    if weighting.batch_normalize:
        found["rollout_is_batch_norm_factor"] = weighting.norm_factor(pairs)
    return found


def _extremes(pairs: Pairs, weighting: Weighting, weights: np.ndarray) -> dict[str, float]:
    logs = weighting.log_weights(pairs)
    if weighting.level == "sequence":
        high, low = logs > np.log(weighting.upper), logs < np.log(weighting.floor)
        largest, smallest = np.exp(min(logs.max(), 20.0)), np.exp(logs.min())
        shares = high.mean(), low.mean()
    else:
        raw = weighting.raw(pairs)
        largest, smallest = weights.max(), weights.min()
        shares = (
            _masked_mean(pairs, (raw > weighting.upper).astype(float)),
            _masked_mean(pairs, (raw < weighting.floor).astype(float)),
        )
    return {
        "rollout_is_max": largest,
        "rollout_is_min": smallest,
        "rollout_is_ratio_fraction_high": shares[0],
        "rollout_is_ratio_fraction_low": shares[1],
    }


def _sequence_weights(pairs: Pairs, weighting: Weighting, weights: np.ndarray) -> dict[str, float]:
    means, raw = pairs.sequence_means(weights), pairs.sequence_means(weighting.raw(pairs))
    spread = exact_sum((means - exact_mean(means)) ** 2)
    return {
        "rollout_is_seq_mean": exact_mean(means),
        "rollout_is_seq_std": np.sqrt(spread / (len(means) - 1)) if len(means) > 1 else 0.0,
        "rollout_is_seq_max": means.max(),
        "rollout_is_seq_min": means.min(),
        "rollout_is_seq_max_deviation": np.abs(means - 1).max(),
        "rollout_is_seq_fraction_high": (raw > weighting.upper).mean(),
        "rollout_is_seq_fraction_low": (raw < weighting.floor).mean(),
    }


def _masked_mean(pairs: Pairs, values: np.ndarray) -> float:
    return exact_sum(pairs.sequence_sums(values)) / (pairs.tokens + 1e-8)
