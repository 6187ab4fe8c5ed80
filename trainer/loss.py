"""The loss, as a pure function of the log-probabilities of the completion tokens.

It is a sum over tokens divided by `num_tokens_global`, the number of completion tokens of the whole optimizer
step. The caller passes it in, so cutting a step into micro-batches changes neither the loss nor the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LossSums:
    """What a micro-batch adds to the metrics of its step: sums over its tokens, which pool by addition.

    loss: already divided by the tokens of the step. clipped: tokens whose gradient the clip cuts off.
    kl: sum of k3 estimates of KL(old || current), in nats. ratio_max: the largest ratio (pools by maximum).
    """

    tokens: int = 0
    loss: float = 0.0
    clipped: int = 0
    kl: float = 0.0
    ratio_max: float = 0.0

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(
            tokens=self.tokens + other.tokens,
            loss=self.loss + other.loss,
            clipped=self.clipped + other.clipped,
            kl=self.kl + other.kl,
            # Not the built-in max, which can lose a NaN.
            ratio_max=float(np.maximum(self.ratio_max, other.ratio_max)),
        )


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    num_tokens_global: int,
    clip_ratio_low: float,
    clip_ratio_high: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, LossSums]:
    """The clipped surrogate of PPO as GRPO uses it, with its own upper bound for the ratio (clip-higher, DAPO).

    ratio = exp(log_probs - old_log_probs); the loss of a token is
    -min(ratio * advantage, clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high) * advantage).
    log_probs, old_log_probs, advantages: [N], one float dtype. weights: the same, constants that multiply the loss of
    a token; 0 leaves it out of loss and gradient. Returns the scalar loss and its detached sums.
    """
    log_ratio = log_probs - old_log_probs
    # Before exp, as 0 times the gradient of an overflow is NaN.
    ratio = (log_ratio if weights is None else log_ratio.masked_fill(weights == 0, 0.0)).exp()
    clipped_ratio = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    loss = -(surrogate if weights is None else surrogate * weights).sum() / num_tokens_global
    return loss, _sums(loss.detach(), log_ratio.detach(), advantages, clip_ratio_low, clip_ratio_high)


def _sums(
    loss: Tensor, log_ratio: Tensor, advantages: Tensor, clip_ratio_low: float, clip_ratio_high: float
) -> LossSums:
    ratio = log_ratio.exp()
    too_high = (ratio > 1 + clip_ratio_high) & (advantages > 0)
    too_low = (ratio < 1 - clip_ratio_low) & (advantages < 0)
    return LossSums(
        tokens=log_ratio.numel(),
        loss=loss.item(),
        clipped=int((too_high | too_low).sum()),
        # k3 (Schulman): unbiased under the old policy and never negative, unlike the plain -log_ratio.
        kl=(log_ratio.double().expm1() - log_ratio.double()).sum().item(),
        ratio_max=log_ratio.exp().max().item(),
    )
