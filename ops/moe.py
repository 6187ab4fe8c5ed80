"""Mixture of experts as Ring-linear routes it (report 2.2.1; DeepSeek-V3's aux-loss-free router, 2408.15664).

Router: scores = sigmoid(logits) in FP32; selection on scores + expert_bias: a group's score is the sum of its two best,
the best groups are kept, then the best experts among them; weights are the *unbiased* scores of the chosen,
renormalised and scaled. Ties go to the lowest index. Experts: y = sum_e w_e SwiGLU_e(x), summed in FP32 in ascending
expert order, so neither the order of scores nor who else is in the batch moves a bit (design A2).

Letters: T tokens, E experts, k experts per token, D model, F expert width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops.elementwise import sigmoid
from ops.linear import grouped_linear, padded_rows
from ops.swiglu import swiglu


def route_reference(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """One token at a time, by explicit comparison."""
    ids, weights = [], []
    for row in torch.sigmoid(logits):
        biased = (row + bias).detach().view(num_groups, -1)
        group_scores = biased.sort(descending=True).values[:, :2].sum(1).tolist()
        kept = sorted(range(num_groups), key=lambda g: (-group_scores[g], g))[:top_groups]
        size = biased.shape[1]
        experts = [e for g in kept for e in range(g * size, (g + 1) * size)]
        chosen = sorted(sorted(experts, key=lambda e: (-float(biased.flatten()[e]), e))[:top_k])
        ids.append(torch.tensor(chosen))
        weights.append(row[chosen] / (row[chosen].sum() + 1e-20) * scale)
    return torch.stack(ids), torch.stack(weights)


def route(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """logits FP32 [T, E], bias FP32 [E] -> expert ids int64 [T, k] ascending, weights FP32 [T, k] (differentiable)."""
    scores = _Sigmoid.apply(logits)
    with torch.no_grad():
        biased = (scores + bias).unflatten(-1, (num_groups, -1))
        best_two = biased.sort(dim=-1, descending=True).values[..., :2].sum(-1)
        kept = _top(best_two, top_groups)
        mask = torch.ones_like(best_two, dtype=torch.bool).scatter_(1, kept, False)
        candidates = biased.masked_fill(mask.unsqueeze(-1), float("-inf")).flatten(1)
        ids = _top(candidates, top_k).sort(dim=-1).values
    chosen = scores.gather(1, ids)
    return ids, chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scale


def _top(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest, the lowest index first among equals: torch.topk promises no order for ties."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def experts_reference(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Token by token, in the dtype of x."""
    rows = []
    for row, chosen, scale in zip(x, ids, weights, strict=True):
        outputs = []
        for e, w in zip(chosen.tolist(), scale, strict=True):
            gate, up = (gate_up[e] @ row).chunk(2)
            outputs.append(w * (down[e] @ (gate * torch.sigmoid(gate) * up)))
        rows.append(torch.stack(outputs).sum(0))
    return torch.stack(rows)


def experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """x FP32 [T, D], gate_up [E, 2F, D], down [E, D, F], ids and weights [T, k] from `route` -> FP32 [T, D]."""
    rows = _arrange(ids, gate_up[0].numel(), gate_up.shape[0], dtype)
    hidden = swiglu(grouped_linear(_Permute.apply(x.to(dtype), rows.source, rows.place), gate_up, rows.counts, dtype))
    y: Tensor = _Combine.apply(grouped_linear(hidden, down, rows.counts, dtype), weights, rows.source, rows.place)
    return y


@dataclass(frozen=True)
class _ExpertRows:
    """Where assignments go: rows grouped by expert, ascending tokens inside each group, groups padded in length."""

    source: Tensor  # [R] token of each row; a padding row repeats token 0 and is read by nobody
    place: Tensor  # [T, k] row of each assignment
    counts: list[int]  # [E] rows of each group


def _arrange(ids: Tensor, weight_size: int, experts: int, dtype: torch.dtype) -> _ExpertRows:
    flat = ids.flatten()
    order, used = flat.argsort(stable=True), flat.bincount(minlength=experts)
    counts = [padded_rows(count, weight_size, dtype) if count else 0 for count in used.tolist()]
    padding = torch.tensor(counts) - used
    destination = torch.arange(len(order)) + (padding.cumsum(0) - padding).repeat_interleave(used)
    source = order.new_zeros(sum(counts)).index_copy_(0, destination, order // ids.shape[1])
    place = torch.empty_like(order).index_copy_(0, order, destination)
    return _ExpertRows(source, place.view_as(ids), counts)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = sigmoid(x)
        ctx.save_for_backward(s)
        return s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (s,) = ctx.saved_tensors
        return grad * s * (1.0 - s)


class _Permute(torch.autograd.Function):
    """Token rows to expert rows; backward sums a token's assignments in slot order instead of by scattered adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        slots = place.unbind(1)
        total = grad.index_select(0, slots[0]).float()
        for slot in slots[1:]:
            total += grad.index_select(0, slot)
        return total.to(grad.dtype), None, None


class _Combine(torch.autograd.Function):
    """y [T, D] = sum over slots, in order, of weights[:, slot] * rows[place[:, slot]], in FP32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, source, place)
        total = rows.new_zeros(len(place), rows.shape[1], dtype=torch.float32)
        for slot, weight in zip(place.unbind(1), weights.unbind(1), strict=True):
            total += rows.index_select(0, slot).float().mul_(weight.unsqueeze(1))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, source, place = ctx.saved_tensors
        per_row = grad.index_select(0, source)
        grad_weights = (per_row * rows.float()).sum(-1)[place]
        row_weights = grad.new_zeros(len(rows)).index_copy_(0, place.flatten(), weights.flatten())  # 0 for padding
        return per_row.mul_(row_weights.unsqueeze(1)).to(rows.dtype), grad_weights, None, None
