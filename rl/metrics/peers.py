"""Mismatch metrics by the names and definitions of other systems, so that a run can be held against theirs.

d = log pi_train - log pi_rollout of a token, r = exp(d); settings a definition needs are the system's defaults.
Each function takes at least one token.
"""

from collections.abc import Callable, Sequence

import numpy as np

from rl.metrics.mismatch import under
from rl.metrics.pairs import Pairs, bounded_exp, exact_mean
from rl.metrics.verl import verl, verl_2026_01


def slime(pairs: Pairs, upper: float = 2.0) -> dict[str, float]:
    """Source: slime, loss.py and examples/train_infer_mismatch_helper/mis.py: level token, mode truncate at `upper`.

    Everything is a mean over sequences of the mean over a sequence's tokens; a sequence whose mask is empty counts as 0
    in each (its perplexity too, unlike verl's 1). `tis*`: weights clamped to [0, upper].
    """
    d, ratio = pairs.log_ratio, pairs.bounded_ratio
    clipped = np.clip(np.exp(d), 0, upper)
    values = {
        "train_rollout_logprob_abs_diff": np.abs(d),
        "tis": np.exp(d),
        "tis_abs": np.abs(np.exp(d) - 1),
        "tis_clipfrac": (clipped != np.exp(d)).astype(float),
        "mis_kl": -d,
        "mis_k3_kl": np.exp(d) - d - 1,
        "mis_tis_weight_before_bound": ratio,
        "mis_tis_weight_after_bound": np.clip(ratio, 0, upper),
        "mis_tis_truncate_fraction": (ratio > upper).astype(float),
    }
    found = {name: exact_mean(pairs.sequence_means(each)) for name, each in values.items()}
    return under("train", found | _slime_sequences(pairs))


def _slime_sequences(pairs: Pairs) -> dict[str, float]:
    train, rollout = -pairs.sequence_means(pairs.train), -pairs.sequence_means(pairs.rollout)
    values = {
        "mis_training_log_ppl": train,
        "mis_training_ppl": np.exp(train),
        "mis_rollout_log_ppl": rollout,
        "mis_rollout_ppl": np.exp(rollout),
        "mis_log_ppl_diff": train - rollout,
        "mis_log_ppl_abs_diff": np.abs(train - rollout),
        "mis_ppl_ratio": np.exp(train - rollout),
        "mis_chi2_token": pairs.sequence_means(pairs.bounded_ratio**2) - 1,
        "mis_chi2_seq": bounded_exp(pairs.sequence_sums(pairs.log_ratio)) ** 2 - 1,
    }
    filled = pairs.lengths > 0
    return {name: exact_mean(np.where(filled, each, 0.0)) for name, each in values.items()}


def nemo_rl(pairs: Pairs) -> dict[str, float]:
    """Source: NeMo-RL, ClippedPGLossFn, KL estimator k3, no truncation. gen_kl_error: KL(rollout || train),
    policy_kl_error: KL(train || rollout). js_divergence_error: k3 of both against the mixture of the two
    probabilities. *_seq_mult_prob_error: of the mean of exp(|d|) over each sequence that has tokens."""
    d, train, rollout = pairs.log_ratio, pairs.train, pairs.rollout
    mixture = np.logaddexp(train, rollout) - np.log(2)
    error = np.exp(np.abs(d))
    sequences = pairs.sequence_means(error)[pairs.lengths > 0]
    values = {
        "token_mult_prob_error": pairs.mean(error),
        "gen_kl_error": pairs.mean(_k3(d)),
        "policy_kl_error": pairs.mean(_k3(-d)),
        "js_divergence_error": pairs.mean(_k3(train - mixture) + _k3(rollout - mixture)) / 2,
        "sampling_importance_ratio": pairs.mean(np.exp(d)),
        "approx_entropy": -pairs.mean(np.exp(d) * train),
        "max_seq_mult_prob_error": sequences.max(),
        "mean_seq_mult_prob_error": exact_mean(sequences),
        "min_seq_mult_prob_error": sequences.min(),
    }
    return under("train", values)


def trl(pairs: Pairs, cap: float = 3.0) -> dict[str, float]:
    """Source: TRL, GRPOTrainer, mode sequence_mask: the ratio of a sequence is exp(sum of d), 0 above `cap`; 1 for a
    sequence whose mask is empty."""
    absolute, ratio = np.abs(pairs.log_ratio), np.exp(pairs.sequence_sums(pairs.log_ratio))
    ratio = np.where(ratio > cap, 0.0, ratio)
    values = {
        "sampling_logp_difference/mean": pairs.mean(absolute),
        "sampling_logp_difference/max": absolute.max(),
        "importance_sampling_ratio/min": ratio.min(),
        "importance_sampling_ratio/mean": exact_mean(ratio),
        "importance_sampling_ratio/max": ratio.max(),
    }
    return under("sampling", values)


def prime_rl(pairs: Pairs) -> dict[str, float]:
    """Source: prime-rl: r - log r - 1 over tokens; std unbiased."""
    kl = _k3(pairs.log_ratio)
    return under("mismatch_kl/all", {"mean": pairs.mean(kl), "std": pairs.unbiased_std(kl), "max": kl.max()})


def skyrl(pairs: Pairs) -> dict[str, float]:
    """Source: SkyRL: |d| over tokens; std unbiased."""
    absolute = np.abs(pairs.log_ratio)
    values = {
        "mean": pairs.mean(absolute),
        "max": absolute.max(),
        "min": absolute.min(),
        "std": pairs.unbiased_std(absolute),
    }
    return {f"policy/rollout_train_logprobs_abs_diff_{name}": float(value) for name, value in values.items()}


def openrlhf(pairs: Pairs) -> dict[str, float]:
    """Source: OpenRLHF, PolicyLoss: the mean of -d over tokens."""
    return {"train/vllm_kl": pairs.mean(-pairs.log_ratio)}


def tinker(pairs: Pairs) -> dict[str, float]:
    """Source: Tinker cookbook: means over tokens of -d and of d^2 / 2."""
    d = pairs.log_ratio
    return under("optim", {"kl_sample_train_v1": pairs.mean(-d), "kl_sample_train_v2": pairs.mean(d**2) / 2})


PEERS: dict[str, Callable[[Pairs], dict[str, float]]] = {
    "verl": verl,
    "verl-2026-01": verl_2026_01,
    "slime": slime,
    "nemo-rl": nemo_rl,
    "trl": trl,
    "prime-rl": prime_rl,
    "skyrl": skyrl,
    "openrlhf": openrlhf,
    "tinker": tinker,
}
"""By the name that `monitor.names` of a recipe gives."""


def peer_metrics(pairs: Pairs, names: Sequence[str]) -> dict[str, float]:
    """The metrics of these systems; empty without tokens."""
    found: dict[str, float] = {}
    if pairs.tokens:
        with np.errstate(over="ignore", invalid="ignore"):
            for name in names:
                found |= PEERS[name](pairs)
    return found


def _k3(log_ratio: np.ndarray) -> np.ndarray:
    return np.exp(log_ratio) - 1 - log_ratio
