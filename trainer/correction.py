"""Importance weights and masks for tokens whose sampler was not quite the policy that is trained.

Of each token: d = log pi_train - log pi_rollout, rho = exp(d). pi_train is the trainer's probability under the weights
before the update (pi_old of the clipped loss), pi_rollout the engine's record. Sums of d are clamped to [-20, 20]
before exp. The weight multiplies the token's loss, without gradient:

    token_tis       min(rho, cap)                                   Flash-RL, 2025; verl's rollout_is=token
    sequence_tis    min(exp(sum of d), cap) on all of a sequence    verl's rollout_is=sequence
    icepop          rho where low <= rho <= high, else 0            IcePop, Ring-1T (2510.18855): 0.5, 5
    kpop            rho where the divergence is at most max_binary_kl, else 0. The divergence is the larger of
                    KL(p || q) and KL(q || p) of two coins, p = pi_train and q = pi_rollout; KPop as in AReaL, 2.0
    sequence_mask   exp(sum of d) where within [low, high], else 0  verl's seq-MIS: 0.5, 2
    geometric_mask  1 where low <= exp(mean of d) <= high, else 0   verl's geometric rejection: 0.999, 1.001

Two rules on top drop whole sequences: `veto`, any rho below it (slime's mis.py, 1e-4), and `off_policy_delta`, a
negative advantage and a mean of -d above it (DeepSeek-V3.2's off-policy sequence masking).

A token that is left out still counts in the loss's denominator, as in IcePop: so no weight depends on which tokens
share a micro-batch, and a step that leaves out all of them has gradient 0. Dividing the weights by their mean (verl's
batch normalisation) would need it before the first backward, and AdamW undoes it; `weight_mean` is that factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.correction_config import CorrectionConfig

CLAMP = 20.0  # nats
_EPS = 1e-8  # keeps the probability of a coin off 0 and 1, as AReaL does


@dataclass(frozen=True)
class CorrectionSums:
    """What a micro-batch adds to the correction/* metrics of its step; pools by addition.

    weight, weight_squared: sums over tokens of the applied weights. truncated: tokens whose weight the cap cut.
    low, high: tokens that a mask left out because rho (of token or sequence) was too small or too large; kpop counts by
    the side of 1 on which rho lies. masked: tokens of weight 0 for any reason. sequences_masked: those of which nothing
    is left. vetoed, off_policy: sequences that those rules dropped.
    """

    tokens: int = 0
    weight: float = 0.0
    weight_squared: float = 0.0
    truncated: int = 0
    low: int = 0
    high: int = 0
    masked: int = 0
    sequences_masked: int = 0
    vetoed: int = 0
    off_policy: int = 0

    def __add__(self, other: CorrectionSums) -> CorrectionSums:
        return CorrectionSums(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def metrics(self) -> dict[str, float]:
        """weight_ess: (mean weight)^2 / mean squared weight, the effective share of tokens; 0 where none is left."""
        squared = self.weight_squared * self.tokens
        return {
            "correction/weight_mean": self.weight / self.tokens,
            "correction/weight_ess": self.weight**2 / squared if squared else 0.0,
            "correction/truncated_fraction": self.truncated / self.tokens,
            "correction/masked_fraction": self.masked / self.tokens,
            "correction/masked_fraction_low": self.low / self.tokens,
            "correction/masked_fraction_high": self.high / self.tokens,
            "correction/sequences_masked": float(self.sequences_masked),
            "correction/sequences_vetoed": float(self.vetoed),
            "correction/sequences_off_policy": float(self.off_policy),
        }


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The tokens of some completions, one after the other. d, log_probs: float64 [N]; lengths, sequence of each."""

    d: Tensor
    log_probs: Tensor
    lengths: Tensor
    sequence: Tensor

    def sums(self) -> Tensor:
        """Of d over each sequence, [B]."""
        return torch.stack([part.sum() for part in self.d.split(self.lengths.tolist())])

    def spread(self, values: Tensor) -> Tensor:
        """[B] -> [N]"""
        return values[self.sequence]

    def any_of(self, marked: Tensor) -> Tensor:
        """bool [N] -> bool [B]"""
        return torch.stack([part.any() for part in marked.split(self.lengths.tolist())])


def correction_weights(
    log_probs: Tensor,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    lengths: Sequence[int],
    config: CorrectionConfig,
) -> tuple[Tensor, CorrectionSums]:
    """The weight of every completion token, in the dtype of log_probs, detached, and what to count.

    log_probs, rollout_log_probs, advantages: [N], the trainer's and the engine's record; lengths: completion tokens of
    each sequence, together N. Computed in float64. A NaN in log_probs stays one.
    """
    tokens = _tokens(log_probs, rollout_log_probs, lengths)
    ratio, low, high, truncated = _method(tokens, config)
    vetoed, off_policy = _dropped(tokens, advantages, config)
    out = low | high | tokens.spread(vetoed | off_policy)
    weights = ratio.masked_fill(out, 0.0)
    return weights.to(log_probs.dtype), CorrectionSums(
        tokens=len(weights),
        weight=weights.sum().item(),
        weight_squared=weights.square().sum().item(),
        truncated=int((truncated & ~out).sum()),
        low=int(low.sum()),
        high=int(high.sum()),
        masked=int(out.sum()),
        sequences_masked=int((~tokens.any_of(~out)).sum()),
        vetoed=int(vetoed.sum()),
        off_policy=int(off_policy.sum()),
    )


def _tokens(log_probs: Tensor, rollout_log_probs: Tensor, lengths: Sequence[int]) -> _Tokens:
    log_probs = log_probs.detach().double()
    each = torch.tensor(lengths, device=log_probs.device)
    sequence = torch.arange(len(each), device=each.device).repeat_interleave(each)
    return _Tokens(log_probs - rollout_log_probs.double(), log_probs, each, sequence)


def _method(tokens: _Tokens, config: CorrectionConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight, too low, too high, truncated) of every token, [N] each; the weight before masks."""
    none = torch.zeros_like(tokens.d, dtype=torch.bool)
    if config.method == "none":
        return torch.ones_like(tokens.d), none, none, none
    ratio = _ratio(tokens, config)
    if config.method in ("token_tis", "sequence_tis"):
        cap = config.bound("cap")
        return ratio.clamp(max=cap), none, none, ratio > cap
    if config.method == "kpop":
        far = _binary_kl(tokens) > config.bound("max_binary_kl")
        return ratio, far & (tokens.d < 0), far & (tokens.d >= 0), none
    low, high = ratio < config.bound("low"), ratio > config.bound("high")
    return torch.ones_like(ratio) if config.method == "geometric_mask" else ratio, low, high, none


def _ratio(tokens: _Tokens, config: CorrectionConfig) -> Tensor:
    """What the method weighs or bounds, of every token."""
    if config.method in ("sequence_tis", "sequence_mask"):
        log_ratio = tokens.spread(tokens.sums())
    elif config.method == "geometric_mask":
        log_ratio = tokens.spread(tokens.sums() / tokens.lengths)
    else:
        log_ratio = tokens.d
    return log_ratio.clamp(-CLAMP, CLAMP).exp()


def _binary_kl(tokens: _Tokens) -> Tensor:
    """The larger of both directions. Their difference in the order of arguments is that of p and q alone."""
    p = tokens.log_probs.exp().clamp(_EPS, 1 - _EPS)
    q = (tokens.log_probs - tokens.d).exp().clamp(_EPS, 1 - _EPS)
    heads, tails = (p / q).log(), ((1 - p) / (1 - q)).log()
    return torch.maximum(p * heads + (1 - p) * tails, -q * heads - (1 - q) * tails)


def _dropped(tokens: _Tokens, advantages: Tensor, config: CorrectionConfig) -> tuple[Tensor, Tensor]:
    """(vetoed, off policy), bool [B] each."""
    none = torch.zeros_like(tokens.lengths, dtype=torch.bool)
    vetoed = none if config.veto is None else tokens.any_of(tokens.d.exp() < config.veto)
    if config.off_policy_delta is None:
        return vetoed, none
    drift = -tokens.sums() / tokens.lengths
    return vetoed, (drift > config.off_policy_delta) & tokens.any_of(advantages < 0)
