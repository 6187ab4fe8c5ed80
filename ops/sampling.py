"""Drawing the next token, with addressed randomness (design A8) and the log-probability it is recorded with (A7).

The uniform number for a token is a pure function of (run seed, step, prompt, sample, position): word 0 of
Philox-4x32-10 (Salmon et al., SC 2011) under the seed as key and the address as counter. The token is the first whose
cumulative probability exceeds it. Which worker draws, in what batch, after which crash, does not matter.
"""

import numpy as np
import torch
from torch import Tensor

from ops.compiled import ONE, ZERO, compiled, exp, f32, share, sum_64
from ops.dispatch import Path, choose
from ops.jit import aligned, jit, launch, like, next_power_of_two, tl
from ops.log_probs import ROW_LANES, RUN, Head, blocks_of, exponentiate, full_log_probs, per_row, runs_in

_FACTORS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(key: int, counters: np.ndarray) -> np.ndarray:
    """Philox-4x32-10: key a 64-bit int, counters uint32 [4, N] -> uint32 [4, N]."""
    even, odd = counters[::2].astype(np.uint64), counters[1::2].astype(np.uint64)
    keys = [((key & 0xFFFFFFFF) + round * _W0, (key >> 32) + round * _W1) for round in range(10)]
    for words in np.array(keys).astype(np.uint64)[:, :, None] & _LOW:
        products = _FACTORS * even
        even, odd = (products >> _SHIFT)[::-1] ^ odd ^ words, (products & _LOW)[::-1]
    return np.stack([even, odd], axis=1).reshape(4, -1).astype(np.uint32)


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


# The CPU path. What the log-probs of a row leave behind, exponentials and the sums of their runs, is what a token is
# drawn from: first its run is found, then the token in it. Rows with limits are drawn once more.


@compiled
def _most_likely_of(x):
    """The lowest token among equals."""
    token = 0
    for i in range(1, x.shape[0]):
        if x[i] > x[token]:
            token = i
    return token


@compiled
def _walk(vocabulary, weights, masses, tops, uniform, shares):
    """The token at `uniform`, and the sum of all weights, in FP64. weights [blocks, length] of the vocabulary, in block
    b relative to exp(tops[b]), masses [blocks, runs] their sums; shares [blocks, runs]: scratch."""
    blocks, length = weights.shape
    total = 0.0
    for b in range(blocks):
        scale = np.float64(exp(tops[b] - tops[blocks - 1]))
        for run in range(runs_in(min(length, vocabulary - b * length))):
            shares[b, run] = scale * masses[b, run]
            total += shares[b, run]
    threshold, before, b, run = uniform * total, 0.0, 0, 0
    while before + shares[b, run] <= threshold:
        if run + 1 < runs_in(min(length, vocabulary - b * length)):
            before, run = before + shares[b, run], run + 1
        elif b + 1 < blocks:
            before, b, run = before + shares[b, run], b + 1, 0
        else:
            break
    scale, end = np.float64(exp(tops[b] - tops[blocks - 1])), min((run + 1) * RUN, length, vocabulary - b * length)
    token = b * length + end - 1
    for i in range(run * RUN, end):
        before += scale * weights[b, i]
        if before > threshold:
            token = b * length + i
            break
    while token > 0 and weights[token // length, token % length] == 0.0:  # rounding put the threshold beyond the last
        token -= 1
    return token, total


@compiled
def _cpu_draw_kernel(
    begin, end, x, temperature, top_p, top_k, min_p, uniform, whole, blocks, length, tokens, log_sums, chosen,
    processed, is_limited
):  # fmt: skip
    """Items are rows of logits, which are divided by their temperature and, where the `whole` row is wanted, become
    log-probs. Draws without limits, and says which rows have some."""
    lanes, tops = np.empty(ROW_LANES, f32), np.empty(blocks, f32)
    weights, masses = np.empty((blocks, length), f32), np.empty((blocks, runs_in(length)), f32)
    shares = np.empty(masses.shape)
    for row in range(begin, end):
        greedy = temperature[row] == ZERO
        log_sum = exponentiate(x[row], ONE if greedy else temperature[row], weights, masses, tops, lanes)
        if greedy:
            token = _most_likely_of(x[row])
        else:
            token, _ = _walk(x.shape[1], weights, masses, tops, uniform[row], shares)
        log_prob = x[row, token] - log_sum
        tokens[row], log_sums[row], chosen[row], processed[row] = token, log_sum, log_prob, ZERO if greedy else log_prob
        is_limited[row] = top_p[row] < ONE or top_k[row] > 0 or min_p[row] > ZERO
        if whole:
            for i in range(x.shape[1]):
                x[row, i] -= log_sum


@compiled
def _cpu_exp_kernel(begin, end, rows, probabilities):
    for row in range(begin, end):
        for i in range(rows.shape[1]):
            probabilities[row, i] = exp(rows[row, i])


@compiled
def _cpu_limited_kernel(begin, end, rows, limited, temperature, uniform, tokens, processed):
    """Items are rows of log-probs, of which `limited` has the probabilities that the limits leave."""
    tops, masses = np.zeros(1, f32), np.empty((1, runs_in(rows.shape[1])), f32)
    shares = np.empty(masses.shape)
    for row in range(begin, end):
        if temperature[row] == 0:
            tokens[row], processed[row] = _most_likely_of(rows[row]), 0.0
            continue
        weights = limited[row : row + 1]
        for run in range(masses.shape[1]):
            masses[0, run] = sum_64(weights[0, run * RUN : (run + 1) * RUN])
        token, mass = _walk(rows.shape[1], weights, masses, tops, uniform[row], shares)
        tokens[row], processed[row] = token, np.log(limited[row, token] / mass)


def _cpu_limited(
    rows: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """rows: log-probs FP32 [B, V] -> tokens int64 [B], and their processed log-probs."""
    probabilities, (batch, vocabulary) = torch.empty_like(rows), rows.shape
    share(_cpu_exp_kernel, batch, 10 * batch * vocabulary, rows, probabilities)
    limited = _truncate(probabilities.double(), top_p, top_k, min_p).float()
    tokens, processed = torch.empty(batch, dtype=torch.int64), torch.empty(batch)
    arguments = rows, limited, temperature, uniform, tokens, processed
    share(_cpu_limited_kernel, batch, 10 * batch * vocabulary, *arguments)
    return tokens, processed


def _cpu_sample(
    hidden: Tensor, weight: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, uniform: Tensor,
    dtype: torch.dtype, banned: Tensor | None, packed: Tensor | None, whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, batch = Head(weight, dtype, packed).logits(hidden), len(hidden)
    tokens, is_limited = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.bool)
    log_sums, chosen, processed = torch.empty(3, batch)
    share(
        _cpu_draw_kernel, batch, 20 * rows.numel(), rows, temperature, top_p, top_k, min_p, uniform, whole,
        *blocks_of(len(weight)), tokens, log_sums, chosen, processed, is_limited,
    )  # fmt: skip
    if banned is not None:
        is_limited |= (banned >= 0).any(1)
    if is_limited.numpy().any():
        at = torch.nonzero(is_limited).squeeze(1)
        allowed, mass = rows[at] if whole else rows[at] - log_sums[at].unsqueeze(1), top_p[at]
        if banned is not None:
            allowed, mass = _without(allowed, mass, banned[at])
        drawn = _cpu_limited(allowed, temperature[at], mass, top_k[at], min_p[at], uniform[at])
        tokens[at], processed[at] = drawn
        own = rows[at, drawn[0]]
        chosen[at] = own if whole else own - log_sums[at]
    return tokens, chosen, rows if whole else rows[:0], processed


def _truncate(probabilities: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor) -> Tensor:
    """Zeroes what lies outside the top k, outside the smallest set of mass top_p, or under min_p of the largest."""
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    rank = torch.arange(ranked.shape[1])
    limit = torch.where(top_k > 0, top_k, ranked.shape[1]).unsqueeze(1)
    beyond = (before >= top_p.unsqueeze(1)) & (top_p < 1).unsqueeze(1) | (rank >= limit)
    dropped = (rank > 0) & (beyond | (ranked < min_p.unsqueeze(1) * ranked[:, :1]))
    return torch.zeros_like(probabilities).scatter_(1, order, ranked.masked_fill(dropped, 0.0))


# The Triton path: one program for each row, which walks the vocabulary in fixed blocks. What top_p and top_k keep are
# the first so many tokens by (probability descending, id ascending). So two numbers describe it: the bits of the least
# probability, found by bisection (FP32 numbers >= 0 are ordered as their bits are), and the last id that has it.


@jit()
def _load_weights(row_ptr, column, V: tl.constexpr):
    """Probabilities of a block, FP32 and as bits; zero beyond the vocabulary."""
    p = tl.exp(tl.load(row_ptr + column, mask=column < V, other=float("-inf")))
    return p, p.to(tl.int32, bitcast=True)


@jit()
def _above(row_ptr, bits, V: tl.constexpr, BLOCK: tl.constexpr):
    """Mass (FP64) and number of the tokens more probable than `bits`."""
    mass = tl.zeros([BLOCK], dtype=tl.float64)
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for first in tl.range(0, V, BLOCK, num_stages=4):
        p, p_bits = _load_weights(row_ptr, first + tl.arange(0, BLOCK), V)
        mass += tl.where(p_bits > bits, p, 0.0).to(tl.float64)
        count += (p_bits > bits).to(tl.int32)
    return tl.sum(mass, axis=0), tl.sum(count, axis=0)


@jit()
def _last_kept(row_ptr, bits, ties, V: tl.constexpr, BLOCK: tl.constexpr):
    """Id of the token number `ties` (from 1) among those of probability `bits`; V where they are fewer."""
    last, seen = V, 0
    for first in tl.range(0, V, BLOCK, num_stages=4):
        column = first + tl.arange(0, BLOCK)
        _, p_bits = _load_weights(row_ptr, column, V)
        tie = ((p_bits == bits) & (column < V)).to(tl.int32)
        reached = (seen + tl.cumsum(tie, axis=0)) == ties
        last = tl.minimum(last, tl.min(tl.where(reached & (tie == 1), column, V), axis=0))
        seen += tl.sum(tie, axis=0)
    return last


@jit()
def _kept(row_ptr, column, bits, last, floor, V: tl.constexpr):
    """Probabilities FP64 of a block, zero where a token is left out."""
    p, p_bits = _load_weights(row_ptr, column, V)
    kept = (p_bits > bits) | ((p_bits == bits) & (column <= last))
    p = p.to(tl.float64)
    return tl.where(kept & (p >= floor), p, 0.0)


@jit()
def _most_likely(row_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    """The largest log-prob of the row and the lowest id that has it."""
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    at = tl.full([BLOCK], V, dtype=tl.int32)
    for first in tl.range(0, V, BLOCK, num_stages=4):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < V, other=float("-inf"))
        at = tl.where(x > best, column, at)
        best = tl.maximum(best, x)
    largest = tl.max(best, axis=0)
    return largest, tl.min(tl.where(best == largest, at, V), axis=0)


@jit()
def _limits(row_ptr, peak, top_p, top_k, V: tl.constexpr, BLOCK: tl.constexpr):
    """What top_p FP64 and top_k keep of a row whose largest probability is `peak`: bits of the least probability, and
    last id that has it."""
    low, high = 0, peak.to(tl.int32, bitcast=True)
    while low < high:  # the least bits such that what is above them reaches neither limit
        middle = low + (high - low) // 2
        mass, count = _above(row_ptr, middle, V, BLOCK)
        fits = (mass < top_p) & (count < top_k)
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    mass, count = _above(row_ptr, high, V, BLOCK)
    p = high.to(tl.float32, bitcast=True).to(tl.float64)
    by_mass = tl.ceil((top_p - mass) / p)  # ties that begin below top_p; all of them where p is 0
    ties = tl.minimum(tl.where(by_mass < V, by_mass, V * 1.0).to(tl.int32), top_k - count)
    return high, _last_kept(row_ptr, high, tl.maximum(ties, 1), V, BLOCK)


@jit()
def _draw_kernel(
    rows_ptr, temperature_ptr, top_p_ptr, top_k_ptr, min_p_ptr, uniform_ptr, token_ptr, processed_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = rows_ptr + row.to(tl.int64) * V
    largest, token = _most_likely(row_ptr, V, BLOCK)
    processed = tl.zeros([], dtype=tl.float32)
    if tl.load(temperature_ptr + row) != 0.0:
        peak = tl.exp(largest)
        top_p, top_k = tl.load(top_p_ptr + row), tl.load(top_k_ptr + row).to(tl.int32)
        bits, last = -1, V
        if (top_p < 1.0) | (top_k > 0):
            limit = tl.where(top_p < 1.0, top_p, float("inf")).to(tl.float64)
            bits, last = _limits(row_ptr, peak, limit, tl.where(top_k > 0, top_k, V), V, BLOCK)
        floor = tl.minimum(tl.load(min_p_ptr + row), 1.0).to(tl.float64) * peak.to(tl.float64)
        total = tl.zeros([BLOCK], dtype=tl.float64)
        for first in tl.range(0, V, BLOCK, num_stages=4):
            total += _kept(row_ptr, first + tl.arange(0, BLOCK), bits, last, floor, V)
        mass = tl.sum(total, axis=0)
        threshold = tl.load(uniform_ptr + row) * mass
        token, end, before = V, 0, tl.zeros([], dtype=tl.float64)
        for first in tl.range(0, V, BLOCK, num_stages=4):
            column = first + tl.arange(0, BLOCK)
            p = _kept(row_ptr, column, bits, last, floor, V)
            passed = (before + tl.cumsum(p, axis=0) > threshold) & (p > 0.0)
            token = tl.minimum(token, tl.min(tl.where(passed, column, V), axis=0))
            end = tl.maximum(end, tl.max(tl.where(p > 0.0, column, 0), axis=0))
            before += tl.sum(p, axis=0)
        token = tl.minimum(token, end)  # where rounding left the threshold beyond the last sum
        processed = tl.log((tl.exp(tl.load(row_ptr + token)).to(tl.float64) / mass).to(tl.float32))
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(processed_ptr + row, processed)


_BLOCK = 4096


def _triton_draw(
    rows: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    batch, vocabulary = rows.shape
    tokens, processed = like(rows, batch, dtype=torch.int64), like(rows, batch)
    settings = [aligned(x) for x in (temperature, top_p, top_k, min_p, uniform)]
    block = min(next_power_of_two(vocabulary), _BLOCK)
    launch(_draw_kernel, (batch,), rows, *settings, tokens, processed, V=vocabulary, BLOCK=block, warps=8)
    return tokens, processed


def _without(rows: Tensor, top_p: Tensor, banned: Tensor) -> tuple[Tensor, Tensor]:
    """The rows with banned tokens impossible, and top_p of the mass that this leaves. Column by column: few are banned,
    and a row's sum must not depend on the others."""
    rows, left = rows.clone(), torch.ones_like(top_p)
    for tokens in banned.unbind(1):
        at = torch.nonzero(tokens >= 0).squeeze(1)
        left[at] -= rows[at, tokens[at]].exp()
        rows[at, tokens[at]] = float("-inf")
    return rows, torch.where(top_p < 1, top_p * left, top_p)


@torch.no_grad()
def sample(
    hidden: Tensor, weight: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, uniform: Tensor,
    dtype: torch.dtype, banned: Tensor | None = None, packed: Tensor | None = None, whole: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Draws a token for each row.

    hidden FP32 [B, D], weight [V, D], both rounded to `dtype`, temperature, top_p, min_p FP32 [B], top_k int64 [B]
    (0: all), uniform FP64 [B] in [0, 1), banned int64 [B, K] tokens that are not drawn (-1: none), packed:
    `pack_weight` of the weight if it stays the same -> tokens int64 [B], their log-probs FP32 [B] before any limit,
    log-probs of the whole vocabulary FP32 [B, V], of no row unless `whole`, and the tokens' processed log-probs FP32
    [B]: of the distribution that is drawn from, limited and normalised again. Temperature 0 takes the most likely
    token, the lowest id among equals, with log-probs at temperature 1 and a processed log-prob of 0.

    The limits: the top_k most likely tokens (ties to the lowest id), the fewest most likely tokens whose mass reaches
    top_p (Holtzman et al., 1904.09751), the tokens with at least min_p of the largest probability (2407.01082). Each is
    measured on the distribution that the temperature makes, without the banned tokens, and a token must pass all three,
    so their order is nothing: as SGLang has it ("joint"). Transformers (top-k, top-p, min-p) and vLLM (min-p, top-k,
    top-p) measure each on what the one before has left, which is another set where top_p comes after another limit.
    """
    if choose("sample", hidden) is not Path.TRITON:
        settings = temperature, top_p, top_k, min_p, uniform
        return _cpu_sample(hidden, weight, *settings, dtype, banned, packed, whole)
    divisor = per_row(torch.where(temperature == 0, 1.0, temperature), hidden)
    rows = full_log_probs(hidden, weight, divisor, dtype)
    allowed, top_p = (rows, top_p) if banned is None else _without(rows, top_p, banned)
    tokens, processed = _triton_draw(allowed, temperature, top_p, top_k, min_p, uniform)
    inside = tokens.clamp(0, rows.shape[1] - 1)  # a kernel that is compiled and not run leaves tokens undefined
    return tokens, rows.gather(1, inside.unsqueeze(1)).squeeze(1), rows if whole else rows[:0], processed


def most_likely(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """rows FP32 [B, V] -> ids int64 [B, count], values FP32 [B, count]: largest first, the lowest id among equals."""
    bits = rows.contiguous().view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # FP32 numbers in the order of integers
    vocabulary = torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device)
    ids = rows.shape[1] - 1 - (((ascending << 32) | vocabulary).topk(count).values & 0xFFFFFFFF)
    return ids, rows.gather(1, ids)
