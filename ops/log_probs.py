"""Language-model head: log-probabilities and entropy of a policy, without ever keeping a [T, V] tensor.

    x = hidden W^T / temperature    log_prob(t) = x_t - log sum_v exp x_v    entropy = log sum exp x - sum_v p_v x_v

hidden FP32 [T, D], W [V, D] (read in its own precision, multiplied in FP32: report 5.2.1, design A5). Rows are taken in
blocks and the vocabulary in fixed blocks merged in ascending order, so a row's bits do not depend on the batch (A1,
A2). Backward recomputes. The engine's sampler and the trainer both come here for a token's log-probability (A7).
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ops.linear import row_invariant_matmul

ROW_BLOCK = 2048  # rows whose logits exist at once; moves no bit
VOCAB_BLOCK = 8192  # part of the reduction order: never changed at run time

Temperature = float | Tensor  # one for all rows, or FP32 [T, 1]


def log_probs_reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The textbook form, in the dtype of hidden."""
    rows = torch.log_softmax(hidden @ weight.to(hidden.dtype).t() / temperature, dim=-1)
    return rows.gather(1, targets[:, None]).squeeze(1), -(rows.exp() * rows).sum(-1)


def log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """targets int64 [T] -> log-probs FP32 [T] (differentiable in hidden and weight), entropy FP32 [T] (in nats, no
    gradient)."""
    result: tuple[Tensor, Tensor] = _LogProbs.apply(hidden, weight, targets, temperature)
    return result


@torch.no_grad()
def full_log_probs(hidden: Tensor, weight: Tensor, temperature: Temperature) -> Tensor:
    """Log-probs over the whole vocabulary, FP32 [T, V], equal in bits to `log_probs` at every target: for checks on a
    few rows."""
    blocks = list(_logit_blocks(hidden, weight.float(), temperature))
    _, log_sum, _ = _row_statistics(blocks, torch.zeros(len(hidden), dtype=torch.int64))
    return torch.cat([x for _, x in blocks], dim=1).sub_(log_sum.unsqueeze(1))


def _logit_blocks(hidden: Tensor, head: Tensor, temperature: Temperature) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, head.shape[0], VOCAB_BLOCK):
        yield first, row_invariant_matmul(hidden, head[first : first + VOCAB_BLOCK]).contiguous().div_(temperature)


def _row_statistics(blocks: Iterable[tuple[int, Tensor]], targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the blocks of x: x at the target, log sum exp, and entropy, FP32 [T] each."""
    top = torch.full((len(targets),), float("-inf"))
    total, weighted, chosen = torch.zeros_like(top), torch.zeros_like(top), torch.empty_like(top)
    for first, x in blocks:
        local, inside = _inside(targets, first, x.shape[1])
        chosen = torch.where(inside, x.gather(1, local).squeeze(1), chosen)
        new_top = torch.maximum(top, x.amax(-1))
        rescale = torch.exp(top - new_top)
        p = (x - new_top.unsqueeze(1)).exp_()
        total = total * rescale + p.sum(-1)
        weighted = weighted * rescale + p.mul_(x).sum(-1)
        top = new_top
    log_sum = top + total.log()
    return chosen, log_sum, log_sum - weighted / total


def _inside(targets: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Column [T, 1] of each target in the vocabulary block that begins at `first`, and whether it lies there [T]."""
    local = targets - first
    return local.clamp(0, width - 1).unsqueeze(1), (local >= 0) & (local < width)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        head = weight.float()
        blocks = [
            _row_statistics(_logit_blocks(rows, head, temperature), row_targets)
            for rows, row_targets in zip(hidden.split(ROW_BLOCK), targets.split(ROW_BLOCK), strict=True)
        ]
        chosen, log_sum, entropy = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        ctx.save_for_backward(hidden, weight, targets, log_sum)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return chosen - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, log_sum = ctx.saved_tensors
        head = weight.float()
        grad_hidden, grad_head = torch.zeros_like(hidden), torch.zeros_like(head)
        for begin in range(0, len(hidden), ROW_BLOCK):
            rows = slice(begin, begin + ROW_BLOCK)
            for first, x in _logit_blocks(hidden[rows], head, ctx.temperature):
                width = x.shape[1]
                grad_x = x.sub_(log_sum[rows].unsqueeze(1)).exp_().mul_(-grad[rows].unsqueeze(1))
                local, inside = _inside(targets[rows], first, width)
                grad_x.scatter_add_(1, local, (grad[rows] * inside).unsqueeze(1))
                grad_x.div_(ctx.temperature)
                grad_hidden[rows] += grad_x @ head[first : first + width]
                grad_head[first : first + width] += grad_x.t() @ hidden[rows]
        return grad_hidden, grad_head.to(weight.dtype), None, None
