"""Language-model head: log-probabilities and entropy of a policy, without ever keeping a [T, V] tensor.

    x = hidden W^T / temperature    log_prob(t) = x_t - log sum_v exp x_v    entropy = log sum exp x - sum_v p_v x_v

hidden FP32 [T, D] and W [V, D] are rounded to the working dtype; products, sums and x are FP32 and never rounded
(report 5.2.1, whose operator reads BF16 and accumulates in FP32; design A5). The vocabulary is taken in fixed blocks
merged in a fixed order, so a row's bits do not depend on the batch (A1, A2). Backward recomputes, and rounds gradients
of x to the working dtype; a gradient passes straight through the rounding of hidden and W. The engine's sampler and the
trainer both come here for a token's log-probability (A7).
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ops import cpu_matmul, lm_head
from ops.autograd import apply
from ops.compiled import ONE, ZERO, compiled, dot_64, exp, f32, fma, largest, share, sum_64
from ops.cpu_matmul import COLUMNS
from ops.dispatch import Path, choose
from ops.jit import aligned, like
from ops.linear import pack_weight

ROW_BLOCK = 2048  # rows whose logits exist at once; moves no bit
_INFINITY = f32(np.inf)
VOCAB_BLOCK = 8192  # part of the reduction order: never changed at run time; a multiple of COLUMNS

Temperature = float | Tensor  # one for all rows, or FP32 [T] or [T, 1]


def log_probs_reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The textbook form, in the dtype of hidden."""
    rows = torch.log_softmax(hidden @ weight.to(hidden.dtype).t() / temperature, dim=-1)
    return rows.gather(1, targets[:, None]).squeeze(1), -(rows.exp() * rows).sum(-1)


# The CPU path.


class Head:
    """W [V, D] as the CPU path multiplies it: rounded to `dtype`, `packed` by the caller or here."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, packed: Tensor | None = None) -> None:
        self._weight, self._dtype, self._vocabulary = weight, dtype, len(weight)
        packed = pack_weight(weight, dtype) if packed is None else packed
        assert packed is not None, "a head on a GPU met rows on a CPU"
        self._packed = packed

    def blocks(self, hidden: Tensor, temperature: Tensor) -> Iterator[tuple[int, Tensor]]:
        """x by blocks of the vocabulary, each with its first column. temperature [T, 1]."""
        hidden = hidden.to(self._dtype)
        for first in range(0, self._vocabulary, VOCAB_BLOCK):
            packed = self._packed[first // COLUMNS : (first + VOCAB_BLOCK) // COLUMNS]
            x = cpu_matmul.multiply(hidden, packed, min(VOCAB_BLOCK, self._vocabulary - first), torch.float32)
            yield first, _tempered(x, temperature)

    def logits(self, hidden: Tensor) -> Tensor:
        """x [T, V] at temperature 1, in the same bits."""
        return cpu_matmul.multiply(hidden.to(self._dtype), self._packed, self._vocabulary, torch.float32)

    def add_gradients(self, grad_x: Tensor, first: int, hidden: Tensor, grad_hidden: Tensor, grad_head: Tensor) -> None:
        """grad_x [T, V'] of the logits from column `first` on, to FP32 gradients of hidden [T, D] and of W [V, D]."""
        part, grad_x = slice(first, first + grad_x.shape[1]), grad_x.to(self._dtype)
        grad_hidden += cpu_matmul.matmul(grad_x, self._weight[part].to(self._dtype), torch.float32)
        grad_head[part] += cpu_matmul.matmul(grad_x.t(), hidden.to(self._dtype), torch.float32)


def _tempered(x: Tensor, temperature: Tensor) -> Tensor:
    return x.div_(temperature) if bool((temperature != 1).any()) else x


ROW_LANES = 64  # of sums over a row
RUN = 512  # exponentials that are summed before they join the total; part of the order too


@compiled
def runs_in(length):
    return (length + RUN - 1) // RUN


@compiled
def _exp_and_sum(values, top, weights, lanes):
    """weights become exp(values - top); their sum, as `sum_64` makes it."""
    lanes[:] = ZERO
    for begin in range(0, values.shape[0] - ROW_LANES + 1, ROW_LANES):
        x, w = values[begin : begin + ROW_LANES], weights[begin : begin + ROW_LANES]
        for lane in range(ROW_LANES):
            e = exp(x[lane] - top)
            w[lane] = e
            lanes[lane] += e
    whole = values.shape[0] - values.shape[0] % ROW_LANES
    for i in range(whole, values.shape[0]):
        weights[i] = exp(values[i] - top)
        lanes[i - whole] += weights[i]
    return sum_64(lanes)


@compiled
def _add_block(values, top, total, weights, masses, lanes):
    """Takes a block of x into its row's largest and into the sum of exp(x - largest), which it returns with what the
    sums so far shrink by; weights become the block's exponentials, masses the sums of their runs."""
    new_top, mass = max(top, largest(values)), ZERO
    for run in range(runs_in(values.shape[0])):
        part = slice(run * RUN, min((run + 1) * RUN, values.shape[0]))
        masses[run] = _exp_and_sum(values[part], new_top, weights[part], lanes)
        mass += masses[run]
    rescale = exp(top - new_top)
    return new_top, fma(total, rescale, mass), rescale


@compiled
def _cpu_statistics_kernel(begin, end, x, first, targets, chosen, top, total, weighted, log_sum):
    """Items are rows. The columns of x are the vocabulary from `first` on, and follow on those before."""
    lanes, weights, masses = np.empty(ROW_LANES, f32), np.empty(x.shape[1], f32), np.empty(runs_in(x.shape[1]), f32)
    for row in range(begin, end):
        if first <= targets[row] < first + x.shape[1]:
            chosen[row] = x[row, targets[row] - first]
        top[row], total[row], rescale = _add_block(x[row], top[row], total[row], weights, masses, lanes)
        weighted[row] = fma(weighted[row], rescale, dot_64(weights, x[row]))
        log_sum[row] = top[row] + np.log(total[row])


@compiled
def exponentiate(x, temperature, weights, masses, tops, lanes):
    """A row of logits [V] is divided by its temperature. -> log sum exp x.

    By blocks of the vocabulary: weights [blocks, length] become exp(x - tops[block]), masses [blocks, runs] sums of
    runs of them, and tops [blocks] the largest x so far.
    """
    if temperature != ONE:
        for i in range(x.shape[0]):
            x[i] /= temperature
    top, total, length = -_INFINITY, ZERO, weights.shape[1]
    for b in range(weights.shape[0]):
        values = x[b * length : min((b + 1) * length, x.shape[0])]
        top, total, _ = _add_block(values, top, total, weights[b], masses[b], lanes)
        tops[b] = top
    return top + np.log(total)


@compiled
def _cpu_normalize_kernel(begin, end, x, temperature, blocks, length):
    """Items are rows."""
    lanes, tops = np.empty(ROW_LANES, f32), np.empty(blocks, f32)
    weights, masses = np.empty((blocks, length), f32), np.empty((blocks, runs_in(length)), f32)
    for row in range(begin, end):
        log_sum = exponentiate(x[row], temperature[row, 0], weights, masses, tops, lanes)
        for i in range(x.shape[1]):
            x[row, i] -= log_sum


def blocks_of(vocabulary: int) -> tuple[int, int]:
    """Of the vocabulary: how many, and the length of all but the last."""
    return -(-vocabulary // VOCAB_BLOCK), min(VOCAB_BLOCK, vocabulary)


def row_statistics(blocks: Iterable[tuple[int, Tensor]], targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the blocks of x: x at the target, log sum exp, and entropy, FP32 [T] each."""
    top, chosen = torch.full(targets.shape, float("-inf")), torch.empty(targets.shape)
    log_sum, total, weighted = torch.empty_like(top), torch.zeros_like(top), torch.zeros_like(top)
    for first, x in blocks:
        share(_cpu_statistics_kernel, len(x), 20 * x.numel(), x, first, targets, chosen, top, total, weighted, log_sum)
    return chosen, log_sum, log_sum - weighted / total


def softmax_gradient_(x: Tensor, first: int, targets: Tensor, log_sum: Tensor, grad: Tensor) -> Tensor:
    """A block of x becomes grad (1[v = target] - p_v), the gradient of x where `grad` [T] is that of the log-prob."""
    grad_x = x.sub_(log_sum.unsqueeze(1)).exp_().mul_(-grad.unsqueeze(1))
    local, inside = _inside(targets, first, x.shape[1])
    return grad_x.scatter_add_(1, local, (grad * inside).unsqueeze(1))


def _inside(targets: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Column [T, 1] of each target in the vocabulary block that begins at `first`, and whether it lies there [T]."""
    local = targets - first
    return local.clamp(0, width - 1).unsqueeze(1), (local >= 0) & (local < width)


def _cpu_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, dtype)
    parts = zip(hidden.split(ROW_BLOCK), targets.split(ROW_BLOCK), temperature.split(ROW_BLOCK), strict=True)
    blocks = [row_statistics(head.blocks(h, t), row_targets) for h, row_targets, t in parts]
    chosen, log_sum, entropy = (torch.cat(values) for values in zip(*blocks, strict=True))
    return chosen, log_sum, entropy


def _cpu_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, log_sum: Tensor, grad: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    head = Head(weight, dtype)
    grad_hidden, grad_head = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    for begin in range(0, len(hidden), ROW_BLOCK):
        rows = slice(begin, begin + ROW_BLOCK)
        for first, x in head.blocks(hidden[rows], temperature[rows]):
            grad_x = softmax_gradient_(x, first, targets[rows], log_sum[rows], grad[rows]).div_(temperature[rows])
            head.add_gradients(grad_x, first, hidden[rows], grad_hidden[rows], grad_head)
    return grad_hidden, grad_head


# The Triton path. Gradients of logits exist for a block of rows and vocabulary at once, which moves no bit of forward.

GRADIENT_ROWS, GRADIENT_COLUMNS = 4096, 8192


def _triton_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x, matrix = lm_head.operands(hidden, weight, dtype)
    return lm_head.statistics(x, matrix, temperature, targets)


def _triton_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, log_sum: Tensor, grad: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, matrix = lm_head.operands(hidden, weight, dtype)
    scale = grad.unsqueeze(1) / temperature
    grad_hidden, grad_head = torch.zeros_like(hidden), torch.zeros_like(matrix, dtype=torch.float32)
    for begin in range(0, len(hidden), GRADIENT_ROWS):
        rows = slice(begin, begin + GRADIENT_ROWS)
        for first in range(0, len(matrix), GRADIENT_COLUMNS):
            part = slice(first, first + GRADIENT_COLUMNS)
            gradient = lm_head.gradient_from_hidden(
                x[rows], matrix[part], temperature[rows], targets[rows], log_sum[rows], scale[rows], first
            )
            lm_head.add_gradients(gradient, x[rows], matrix[part], grad_hidden[rows], grad_head[part])
    return grad_hidden, grad_head


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.path, ctx.dtype = choose("log_probs", hidden), dtype
        hidden, targets, temperature = aligned(hidden), aligned(targets), aligned(temperature)
        forward = _triton_forward if ctx.path is Path.TRITON else _cpu_forward
        chosen, log_sum, entropy = forward(hidden, weight, targets, temperature, dtype)
        ctx.save_for_backward(hidden, weight, targets, temperature, log_sum)
        ctx.mark_non_differentiable(entropy)
        return chosen - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, targets, temperature, log_sum = ctx.saved_tensors
        backward = _triton_backward if ctx.path is Path.TRITON else _cpu_backward
        grad_hidden, grad_head = backward(hidden, weight, targets, temperature, log_sum, aligned(grad), ctx.dtype)
        return grad_hidden, grad_head.to(weight.dtype), None, None, None


def per_row(temperature: Temperature, hidden: Tensor) -> Tensor:
    """The temperature of each row, FP32 [T, 1]."""
    if isinstance(temperature, Tensor):
        return temperature.reshape(-1, 1)
    return torch.full((len(hidden), 1), temperature, dtype=torch.float32, device=hidden.device)


def log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Temperature, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """targets int64 [T] -> log-probs FP32 [T] (differentiable in hidden and weight), entropy FP32 [T] (in nats, no
    gradient). dtype: the working dtype, bfloat16 or float32, which both operands are rounded to."""
    result: tuple[Tensor, Tensor] = apply(_LogProbs, hidden, weight, targets, per_row(temperature, hidden), dtype)
    return result


@torch.no_grad()
def full_log_probs(
    hidden: Tensor, weight: Tensor, temperature: Temperature, dtype: torch.dtype, packed: Tensor | None = None
) -> Tensor:
    """Log-probs over the whole vocabulary, FP32 [T, V], equal in bits to `log_probs` at every target: for the sampler,
    and for checks on a few rows. packed: `pack_weight` of the weight; else it is made here."""
    temperature = aligned(per_row(temperature, hidden))
    if choose("log_probs", hidden) is Path.TRITON:
        logits = like(hidden, len(hidden), len(weight))
        x, matrix = lm_head.operands(hidden, weight, dtype)
        _, log_sum, _ = lm_head.statistics(x, matrix, temperature, logits=logits)
        return logits.sub_(log_sum.unsqueeze(1))
    x = Head(weight, dtype, packed).logits(hidden)
    share(_cpu_normalize_kernel, len(x), 20 * x.numel(), x, temperature, *blocks_of(len(weight)))
    return x
