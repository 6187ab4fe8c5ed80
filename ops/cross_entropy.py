"""Cross-entropy of a language-model head, for supervised training: loss and gradients from one pass over the logits.

    loss = sum_t w_t (log sum_v exp x_v - x_target(t))        x = hidden W^T

Logits exist for a block of rows at a time. While they do, they become their own gradients, w (p - 1[v = target]), which
are multiplied into those of hidden and W: three matrix products, where `log_probs` and its backward take four (the idea
of Liger Kernel's fused linear cross-entropy, 2410.10989). hidden FP32 [T, D], W [V, D] and gradients of logits are
rounded to the working dtype and multiplied as in `log_probs`, so a token's part of the loss has the same bits.
"""

from typing import Any

import torch
from torch import Tensor

from ops import lm_head
from ops.autograd import apply
from ops.dispatch import Path, choose
from ops.jit import aligned, like
from ops.log_probs import ROW_BLOCK, Head, log_probs, row_statistics, softmax_gradient_

LOGITS = 2**28  # numbers that exist at once: 1 GiB, and half of that for BF16 gradients
ROW_STEP = 128

Gradients = tuple[Tensor, Tensor, Tensor]  # the loss, and the gradients of hidden and of W


def cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    rows = torch.log_softmax(hidden @ weight.to(hidden.dtype).t(), dim=-1)
    return -(row_weights * rows.gather(1, targets[:, None]).squeeze(1)).sum()


def _row_blocks(rows: int, vocabulary: int) -> list[slice]:
    size = min(ROW_BLOCK, max(LOGITS // vocabulary // ROW_STEP, 1) * ROW_STEP)
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def _cpu_forward(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, dtype: torch.dtype) -> Gradients:
    head, losses, ones = Head(weight, dtype), torch.empty_like(row_weights), torch.ones_like(row_weights)[:, None]
    grad_hidden, grad_head = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    for rows in _row_blocks(len(hidden), len(weight)):
        blocks = list(head.blocks(hidden[rows], ones[rows]))
        chosen, log_sum, _ = row_statistics(blocks, targets[rows])
        losses[rows] = log_sum - chosen
        for first, x in blocks:
            grad_x = softmax_gradient_(x, first, targets[rows], log_sum, -row_weights[rows])
            head.add_gradients(grad_x, first, hidden[rows], grad_hidden[rows], grad_head)
    return (row_weights * losses).sum(), grad_hidden, grad_head


def _triton_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, dtype: torch.dtype
) -> Gradients:
    x, matrix = lm_head.operands(hidden, weight, dtype)
    losses, ones, scale = torch.empty_like(row_weights), torch.ones_like(row_weights), -row_weights
    grad_hidden, grad_head = torch.zeros_like(hidden), torch.zeros_like(matrix, dtype=torch.float32)
    blocks = _row_blocks(len(hidden), len(matrix))
    logits = like(hidden, blocks[0].stop, len(matrix))
    gradients = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
    for rows in blocks:
        x_rows, gradient = logits[: rows.stop - rows.start], gradients[: rows.stop - rows.start]
        chosen, log_sum, _ = lm_head.statistics(x[rows], matrix, ones[rows], targets[rows], x_rows)
        losses[rows] = log_sum - chosen
        lm_head.gradient_from_logits(x_rows, targets[rows], log_sum, scale[rows], gradient)
        lm_head.add_gradients(gradient, x[rows], matrix, grad_hidden[rows], grad_head)
    return (row_weights * losses).sum(), grad_hidden, grad_head


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        forward = _triton_forward if choose("cross_entropy", hidden) is Path.TRITON else _cpu_forward
        loss, *ctx.gradients = forward(aligned(hidden), weight, aligned(targets), aligned(row_weights), dtype)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        assert ctx.gradients, "the gradients of cross_entropy are kept for one backward pass"
        (grad_hidden, grad_head), ctx.gradients = ctx.gradients, None
        return grad_hidden.mul_(grad), grad_head.mul_(grad).to(ctx.weight_dtype), None, None, None


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden FP32 [T, D], weight [V, D] rounded to `dtype`, targets int64 [T], row_weights FP32 [T] -> the loss in
    nats, an FP32 scalar, differentiable once in hidden and weight."""
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return -(row_weights * log_probs(hidden, weight, targets, 1.0, dtype)[0]).sum()
    loss: Tensor = apply(_CrossEntropy, hidden, weight, targets, row_weights, dtype)
    return loss
