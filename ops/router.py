"""The router of a mixture of experts (report 2.2.1; DeepSeek-V3's aux-loss-free router, 2408.15664).

    scores = sigmoid(logits), or softmax(logits), in FP32
    chosen = the top_k experts by scores + bias, within the top_groups groups by the sum of a group's two best
    weights = scale * scores[chosen], divided by their sum + 1e-20 if `renormalize`

The weights are made of unbiased scores. Ties go to the lowest index, and chosen experts come in ascending order, so
neither the order of scores nor who else is in the batch moves a bit (design A2).

`expert_weights` gives the weights of experts that were chosen elsewhere, with the bits that `route` would give them:
routing replay (R3, 2510.11370), whose gradient reaches the router through the weights alone. `replayed_weights` puts
weights that were recorded elsewhere in their place.

Letters: T tokens, E experts in G groups of S, k experts per token.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ops.autograd import apply
from ops.compiled import ZERO, compiled, exp, f32, plain, share, sigmoid
from ops.dispatch import Path, choose
from ops.elementwise import kernel_sigmoid
from ops.jit import aligned, divide_up, jit, launch, like, next_power_of_two, tl

Scoring = Literal["sigmoid", "softmax"]
FLOOR = 1e-20  # added to the sum of the chosen scores


def route_reference(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    num_groups: int,
    top_groups: int,
    scale: float,
    scoring: Scoring = "sigmoid",
    renormalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """One token at a time, by explicit comparison."""
    ids, weights = [], []
    for row in torch.sigmoid(logits) if scoring == "sigmoid" else torch.softmax(logits, -1):
        biased = (row if bias is None else row + bias).detach().view(num_groups, -1)
        group_scores = biased.sort(descending=True).values[:, :2].sum(1).tolist()
        kept = sorted(range(num_groups), key=lambda g: (-group_scores[g], g))[:top_groups]
        size = biased.shape[1]
        experts = [e for g in kept for e in range(g * size, (g + 1) * size)]
        chosen = sorted(sorted(experts, key=lambda e: (-float(biased.flatten()[e]), e))[:top_k])
        ids.append(torch.tensor(chosen))
        weights.append(row[chosen] / (row[chosen].sum() + FLOOR if renormalize else 1.0) * scale)
    return torch.stack(ids), torch.stack(weights)


# The CPU path.


@compiled
def _score(logits, softmax, scores):
    """Of one token."""
    if softmax:
        top, total = logits[0], ZERO
        for e in range(1, logits.shape[0]):
            top = max(top, logits[e])
        for e in range(logits.shape[0]):
            scores[e] = exp(logits[e] - top)
            total += scores[e]
        for e in range(logits.shape[0]):
            scores[e] /= total
    else:
        for e in range(logits.shape[0]):
            scores[e] = sigmoid(logits[e])


@compiled
def _take_largest(values, taken):
    """The place of the largest not taken yet, the lowest among equals."""
    best = -1
    for i in range(values.shape[0]):
        if not taken[i] and (best < 0 or values[i] > values[best]):
            best = i
    taken[best] = True
    return best


@compiled
def _choose(biased, num_groups, top_groups, ids):
    """The ids of one token, ascending."""
    size = biased.shape[0] // num_groups
    best_two, barred = np.empty(num_groups, f32), np.ones(biased.shape[0], np.bool_)
    taken = np.zeros(num_groups, np.bool_)
    for group in range(num_groups):
        members, seen = biased[group * size : (group + 1) * size], np.zeros(size, np.bool_)
        best_two[group] = members[_take_largest(members, seen)]
        if size > 1:
            best_two[group] += members[_take_largest(members, seen)]
    for _ in range(top_groups):
        group = _take_largest(best_two, taken)
        barred[group * size : (group + 1) * size] = False
    for slot in range(ids.shape[0]):
        ids[slot] = _take_largest(biased, barred)
    ids.sort()


@compiled
def _cpu_route_kernel(
    begin, end, logits, bias, num_groups, top_groups, scale, softmax, renormalize, chosen, ids, weights
):
    """Items are tokens; bias [E] may be empty; chosen: the ids are there already."""
    scores, biased = np.empty(logits.shape[1], f32), np.empty(logits.shape[1], f32)
    for token in range(begin, end):
        _score(logits[token], softmax, scores)
        if not chosen:
            biased[:] = scores
            for e in range(bias.shape[0]):
                biased[e] += bias[e]
            _choose(biased, num_groups, top_groups, ids[token])
        total = ZERO
        for slot in range(ids.shape[1]):
            weights[token, slot] = scores[ids[token, slot]]
            total += weights[token, slot]
        for slot in range(ids.shape[1]):
            if renormalize:
                weights[token, slot] /= total + f32(FLOOR)
            weights[token, slot] *= scale


class _CpuRoute(torch.autograd.Function):
    """ids: None, or experts that were chosen elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, ids: Tensor | None, top_k: int, num_groups: int, top_groups: int,
        scale: float, softmax: bool, renormalize: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tokens, chosen = len(logits), ids is not None
        weights = torch.empty(tokens, top_k)
        ids = torch.empty(tokens, top_k, dtype=torch.int64) if ids is None else ids.contiguous()
        logits, bias = plain(logits), torch.empty(0) if bias is None else plain(bias)
        share(
            _cpu_route_kernel, tokens, 20 * logits.numel() * (1 + top_k // 4), logits, bias, num_groups, top_groups,
            f32(scale), softmax, renormalize, chosen, ids, weights,
        )  # fmt: skip
        ctx.save_for_backward(logits, ids)
        ctx.settings = scale, softmax, renormalize
        ctx.mark_non_differentiable(ids)
        return ids, weights

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        (logits, ids), (scale, softmax, renormalize) = ctx.saved_tensors, ctx.settings
        scores, grad = logits.softmax(-1) if softmax else torch.sigmoid(logits), grad * scale
        if renormalize:
            chosen = scores.gather(1, ids)
            total = chosen.sum(-1, keepdim=True) + FLOOR
            grad = (grad - (grad * chosen).sum(-1, keepdim=True) / total) / total
        grad_scores = torch.zeros_like(scores).scatter_(1, ids, grad)
        inner = (grad_scores * scores).sum(-1, keepdim=True) if softmax else grad_scores * scores
        return (grad_scores - inner).mul_(scores), None, None, None, None, None, None, None, None


# The Triton path: a program routes BLOCK_T tokens. Experts lie on a grid of groups, padded to powers of two in both
# directions, in which the order of indices is the order of experts.


@jit()
def _scores(logits_ptr, token, tokens, E: tl.constexpr, GROUPS, SIZE, PLACES: tl.constexpr, SOFTMAX: tl.constexpr):
    """Scores [BLOCK_T, PLACES], 0 where a place holds no expert; the expert of each place; which places hold one."""
    place = tl.arange(0, PLACES)
    group, member = place // GROUPS, place % GROUPS
    expert = group * SIZE + member
    real = (member < SIZE) & (expert < E)
    inside = (token < tokens)[:, None] & real[None, :]
    logits = tl.load(logits_ptr + token[:, None] * E + expert[None, :], mask=inside, other=float("-inf"))
    if SOFTMAX:
        top = tl.max(logits, axis=1)
        scores = tl.where(inside, tl.exp(logits - tl.where(token < tokens, top, 0.0)[:, None]), 0.0)
        total = tl.sum(scores, axis=1)
        scores = tl.div_rn(scores, tl.where(token < tokens, total, 1.0)[:, None])
    else:
        scores = tl.where(inside, kernel_sigmoid(logits), 0.0)
    return scores, expert, real


@jit("tokens")
def _forward_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, tokens, scale,
    E: tl.constexpr, GROUPS: tl.constexpr, TOP_K: tl.constexpr, TOP_GROUPS: tl.constexpr, BIASED: tl.constexpr,
    SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    place = tl.arange(0, BLOCK_G * BLOCK_S)
    scores, expert, real = _scores(
        logits_ptr, token, tokens, E, BLOCK_S, E // GROUPS, BLOCK_G * BLOCK_S, SOFTMAX
    )  # fmt: skip
    biased = scores
    if BIASED:
        biased += tl.load(bias_ptr + expert, mask=real, other=0.0)[None, :]
    left = tl.where(real[None, :], biased, float("-inf"))
    if TOP_GROUPS < GROUPS:
        grid = tl.reshape(left, [BLOCK_T, BLOCK_G, BLOCK_S])
        member = tl.arange(0, BLOCK_S)[None, None, :]
        best = tl.max(grid, axis=2)
        without = tl.where(member == tl.argmax(grid, axis=2)[:, :, None], float("-inf"), grid)
        group_scores = best + (tl.max(without, axis=2) if E // GROUPS > 1 else 0.0)
        group = tl.arange(0, BLOCK_G)[None, :]
        group_scores = tl.where(group < GROUPS, group_scores, float("-inf"))
        kept = tl.zeros([BLOCK_T, BLOCK_G], dtype=tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            hit = group == tl.argmax(group_scores, axis=1)[:, None]
            kept = tl.where(hit, 1, kept)
            group_scores = tl.where(hit, float("-inf"), group_scores)
        grid = tl.where(kept[:, :, None] > 0, grid, float("-inf"))
        left = tl.reshape(grid, [BLOCK_T, BLOCK_G * BLOCK_S])
    chosen = tl.zeros([BLOCK_T, BLOCK_G * BLOCK_S], dtype=tl.int32)
    for _ in tl.static_range(TOP_K):
        hit = place[None, :] == tl.argmax(left, axis=1)[:, None]
        chosen = tl.where(hit, 1, chosen)
        left = tl.where(hit, float("-inf"), left)
    rank = tl.where(chosen > 0, tl.cumsum(chosen, axis=1) - 1, -1)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        total += tl.sum(tl.where(rank == slot, scores, 0.0), axis=1)
    for slot in tl.static_range(TOP_K):
        weight = tl.sum(tl.where(rank == slot, scores, 0.0), axis=1)
        if RENORMALIZE:
            weight = tl.div_rn(weight, total + 1e-20)
        tl.store(weights_ptr + token * TOP_K + slot, weight * scale, mask=token < tokens)
        chosen_expert = tl.sum(tl.where(rank == slot, expert[None, :], 0), axis=1)
        tl.store(ids_ptr + token * TOP_K + slot, chosen_expert.to(tl.int64), mask=token < tokens)


@jit("tokens")
def _weights_kernel(
    logits_ptr, ids_ptr, weights_ptr, tokens, scale,
    E: tl.constexpr, TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    scores, expert, _ = _scores(logits_ptr, token, tokens, E, BLOCK_E, E, BLOCK_E, SOFTMAX)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        chosen = tl.load(ids_ptr + token * TOP_K + slot, mask=token < tokens, other=-1)
        total += tl.sum(tl.where(expert[None, :] == chosen[:, None], scores, 0.0), axis=1)
    for slot in tl.static_range(TOP_K):
        chosen = tl.load(ids_ptr + token * TOP_K + slot, mask=token < tokens, other=-1)
        weight = tl.sum(tl.where(expert[None, :] == chosen[:, None], scores, 0.0), axis=1)
        if RENORMALIZE:
            weight = tl.div_rn(weight, total + 1e-20)
        tl.store(weights_ptr + token * TOP_K + slot, weight * scale, mask=token < tokens)


@jit("tokens")
def _backward_kernel(
    logits_ptr, ids_ptr, grad_ptr, grad_logits_ptr, tokens, scale,
    E: tl.constexpr, TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """With s the chosen scores, Z their sum and w = scale s / Z: ds_j = scale / Z (g_j - sum_i g_i s_i / Z)."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    scores, expert, real = _scores(logits_ptr, token, tokens, E, BLOCK_E, E, BLOCK_E, SOFTMAX)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    inner = tl.zeros([BLOCK_T], dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        chosen = tl.load(ids_ptr + token * TOP_K + slot, mask=token < tokens, other=-1)
        s = tl.sum(tl.where(expert[None, :] == chosen[:, None], scores, 0.0), axis=1)
        total += s
        inner += s * tl.load(grad_ptr + token * TOP_K + slot, mask=token < tokens, other=0.0)
    grad_scores = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        chosen = tl.load(ids_ptr + token * TOP_K + slot, mask=token < tokens, other=-1)
        grad = tl.load(grad_ptr + token * TOP_K + slot, mask=token < tokens, other=0.0)
        if RENORMALIZE:
            grad = tl.div_rn(grad - tl.div_rn(inner, total + 1e-20), total + 1e-20)
        grad_scores = tl.where(expert[None, :] == chosen[:, None], (grad * scale)[:, None], grad_scores)
    if SOFTMAX:
        grad_logits = scores * (grad_scores - tl.sum(grad_scores * scores, axis=1)[:, None])
    else:
        grad_logits = grad_scores * scores * (1.0 - scores)
    inside = (token < tokens)[:, None] & real[None, :]
    tl.store(grad_logits_ptr + token[:, None] * E + expert[None, :], grad_logits, mask=inside)


_TILE = 4096  # scores a program holds


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, top_k: int, num_groups: int, top_groups: int, scale: float,
        softmax: bool, renormalize: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logits, (tokens, experts) = aligned(logits), logits.shape
        block_g, block_s = next_power_of_two(num_groups), next_power_of_two(experts // num_groups)
        block_t = max(1, _TILE // (block_g * block_s))
        ids, weights = like(logits, tokens, top_k, dtype=torch.int64), like(logits, tokens, top_k)
        launch(
            _forward_kernel, (divide_up(tokens, block_t),), logits, logits if bias is None else aligned(bias), ids,
            weights, tokens, scale, E=experts, GROUPS=num_groups, TOP_K=top_k, TOP_GROUPS=top_groups,
            BIASED=bias is not None, SOFTMAX=softmax, RENORMALIZE=renormalize, BLOCK_T=block_t, BLOCK_G=block_g,
            BLOCK_S=block_s,
        )  # fmt: skip
        ctx.save_for_backward(logits, ids)
        ctx.mark_non_differentiable(ids)
        ctx.settings = {"TOP_K": top_k, "SOFTMAX": softmax, "RENORMALIZE": renormalize}
        ctx.scale = scale
        return ids, weights

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _grad_logits(ctx, grad), None, None, None, None, None, None, None


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, scale: float, softmax: bool, renormalize: bool) -> Tensor:
        logits, ids, (tokens, experts), top_k = aligned(logits), aligned(ids), logits.shape, ids.shape[1]
        block = next_power_of_two(experts)
        block_t = max(1, _TILE // block)
        weights = like(logits, tokens, top_k)
        ctx.settings = {"TOP_K": top_k, "SOFTMAX": softmax, "RENORMALIZE": renormalize}
        ctx.scale = scale
        launch(
            _weights_kernel, (divide_up(tokens, block_t),), logits, ids, weights, tokens, scale, E=experts,
            BLOCK_T=block_t, BLOCK_E=block, **ctx.settings,
        )  # fmt: skip
        ctx.save_for_backward(logits, ids)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _grad_logits(ctx, grad), None, None, None, None


def _grad_logits(ctx: Any, grad: Tensor) -> Tensor:
    logits, ids = ctx.saved_tensors
    tokens, experts = logits.shape
    block = next_power_of_two(experts)
    block_t = max(1, _TILE // block)
    grad_logits = like(logits, tokens, experts)
    launch(
        _backward_kernel, (divide_up(tokens, block_t),), logits, ids, aligned(grad), grad_logits, tokens,
        ctx.scale, E=experts, BLOCK_T=block_t, BLOCK_E=block, **ctx.settings,
    )  # fmt: skip
    return grad_logits


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    num_groups: int,
    top_groups: int,
    scale: float,
    scoring: Scoring = "sigmoid",
    renormalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """logits FP32 [T, E], bias FP32 [E] -> expert ids int64 [T, k] ascending, weights FP32 [T, k] (differentiable)."""
    settings = top_k, num_groups, top_groups, scale, scoring == "softmax", renormalize
    if choose("route", logits) is Path.TRITON:
        ids, weights = apply(_Route, logits, bias, *settings)
    else:
        ids, weights = apply(_CpuRoute, logits, bias, None, *settings)
    return ids, weights


def expert_weights(
    logits: Tensor, ids: Tensor, scale: float, scoring: Scoring = "sigmoid", renormalize: bool = True
) -> Tensor:
    """logits FP32 [T, E], expert ids int64 [T, k] ascending -> weights FP32 [T, k] (differentiable in logits).

    The bits of `route` where the ids are; of softmax scores on a GPU, as long as `route` had a single group.
    """
    if choose("route", logits) is Path.TRITON:
        weights: Tensor = apply(_Weights, logits, ids, scale, scoring == "softmax", renormalize)
        return weights
    settings = ids.shape[1], 1, 1, scale, scoring == "softmax", renormalize
    weights = apply(_CpuRoute, logits, None, ids, *settings)[1]
    return weights


class _StraightThrough(torch.autograd.Function):
    """The value of what was recorded, the gradient of what was computed: the straight-through estimator (1308.3432)."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, recorded: Tensor) -> Tensor:
        return torch.where(recorded.isnan(), own, recorded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def replayed_weights(own: Tensor, recorded: Tensor) -> Tensor:
    """FP32 [T, k] each -> the recorded weights, or own ones where the record is NaN; the gradient goes to `own`, whole.

    With the experts of R3 (2510.11370), which keeps the trainer's weights, the engine's too. Where both are equal no
    bit of value or gradient moves.
    """
    weights: Tensor = apply(_StraightThrough, own, recorded)
    return weights
