"""Drawing the next token, with addressed randomness (design A8) and the log-probability it is recorded with (A7).

The uniform number for a token is a pure function of (run seed, step, prompt, sample, position): word 0 of
Philox-4x32-10 (Salmon et al., SC 2011) under the seed as key and the address as counter. The token is the first whose
cumulative probability exceeds it. Which worker draws, in what batch, after which crash, does not matter.
"""

import numpy as np
import torch
from torch import Tensor

from ops.log_probs import full_log_probs

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(key: int, counters: np.ndarray) -> np.ndarray:
    """Philox-4x32-10: key a 64-bit int, counters uint32 [4, N] -> uint32 [4, N]."""
    c0, c1, c2, c3 = (row.astype(np.uint64) for row in counters)
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def addressed_uniform(seed: int, addresses: np.ndarray) -> Tensor:
    """addresses uint32 [4, N] rows (position, sample, prompt, step) -> FP64 [N] in [0, 1)."""
    return torch.from_numpy(philox(seed, addresses)[0] * 2.0**-32)


def sample_reference(log_probs: Tensor, uniform: float) -> int:
    """One row of log-probs [V]: walk the cumulative distribution."""
    weights = torch.exp(log_probs).double().tolist()
    threshold, cumulative = uniform * sum(weights), 0.0
    for token, weight in enumerate(weights):
        cumulative += weight
        if cumulative > threshold:
            return token
    return max(token for token, weight in enumerate(weights) if weight > 0)


@torch.no_grad()
def sample(
    hidden: Tensor, weight: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a token for each row.

    hidden FP32 [B, D], weight [V, D], temperature and top_p FP32 [B], top_k int64 [B] (0: all), uniform FP64 [B] ->
    tokens int64 [B], their log-probs FP32 [B] before top-p and top-k, log-probs of the whole vocabulary FP32 [B, V].
    Temperature 0 takes the most likely token, the lowest id among equals, with log-probs at temperature 1.
    """
    greedy = temperature == 0
    rows = full_log_probs(hidden, weight, torch.where(greedy, 1.0, temperature).unsqueeze(1))
    probabilities = rows.exp().double()
    if bool((top_p < 1).any() or (top_k > 0).any()):
        probabilities = _truncate(probabilities, top_p, top_k)
    cumulative = probabilities.cumsum(-1)
    threshold = uniform.unsqueeze(1) * cumulative[:, -1:]
    tokens = (cumulative <= threshold).sum(-1).clamp_(max=rows.shape[1] - 1)
    if bool(greedy.any()):
        vocabulary = torch.arange(rows.shape[1])
        best = torch.where(rows == rows.amax(-1, keepdim=True), vocabulary, rows.shape[1]).amin(-1)
        tokens = torch.where(greedy, best, tokens)
    return tokens, rows.gather(1, tokens.unsqueeze(1)).squeeze(1), rows


def _truncate(probabilities: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Zeroes what lies outside the top k, and outside the smallest set of mass top_p (Holtzman et al., 1904.09751)."""
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    rank = torch.arange(ranked.shape[1])
    limit = torch.where(top_k > 0, top_k, ranked.shape[1]).unsqueeze(1)
    dropped = (rank > 0) & ((before >= top_p.unsqueeze(1)) & (top_p < 1).unsqueeze(1) | (rank >= limit))
    return torch.zeros_like(probabilities).scatter_(1, order, ranked.masked_fill(dropped, 0.0))
