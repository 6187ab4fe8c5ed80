"""Blockwise FP8 (report 3.2; the recipe of DeepSeek-V3, 2412.19437): e4m3 values with one FP32 scale for a group.

    scale = max(max |x|, FLOOR) / 448        q = round_to_nearest_even(x / scale), saturating at +-448

Activations and gradients in groups of 1 x 128, weights in blocks of 128 x 128: local to a group, so aligned (A6). A
product takes 128 values of K on the tensor cores, then scales and adds them to an FP32 sum, groups in ascending order:

    y[m, n] = sum_g scale_x[m, g] scale_w[n, g] sum_{k in g} q_x[m, k] q_w[n, k]

The linear layer quantises what it multiplies: y = x W^T, dx = dy W, dW = dy^T x. The last sums over tokens, so it wants
x and dy quantised along tokens, and tensor cores want those transposed. Where activations are recomputed, the first
forward emits x by rows only, the backward pass x transposed only, and a pass that keeps its activations emits both.

Letters: M rows, N outputs, K inputs, G = ceil(K / 128) groups.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import cpu_matmul
from ops.autograd import apply
from ops.dispatch import Path, choose
from ops.elementwise import kernel_sigmoid
from ops.jit import aligned, divide_up, jit, launch, like, next_power_of_two, tl
from ops.rms_norm import rms_norm
from ops.swiglu import swiglu

GROUP = 128
LARGEST = 448.0
FLOOR = 1e-30  # keeps the scale of a group of zeros away from 0
E4M3 = torch.float8_e4m3fn


class Producer(IntEnum):
    """What a quantising pass computes on the way, so that its result never travels in full precision."""

    NONE = 0  # x itself
    SWIGLU = 1  # of gate_up [M, 2K]
    RMS_NORM = 2  # of x, with the scale of each row known


@dataclass(frozen=True)
class Quantized:
    """values e4m3 [M, G * 128], zero beyond K; scale FP32 [M, G], or [ceil(M / 128), G] of a weight."""

    values: Tensor
    scale: Tensor

    def dequantize(self, columns: int) -> Tensor:
        """FP32 [M, columns]."""
        rows = self.values.shape[0]
        scale = self.scale if len(self.scale) == rows else self.scale.repeat_interleave(GROUP, 0)[:rows]
        return (self.values.float().unflatten(1, (-1, GROUP)) * scale.unsqueeze(2)).flatten(1)[:, :columns]


@dataclass(frozen=True)
class Fp8Weight:
    """A weight [N, K] quantised once per version: by blocks, and transposed for the gradient of the input."""

    rows: Quantized
    transposed: Quantized | None
    shape: tuple[int, int]


def quantize_reference(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """x [M, K] in blocks of `rows` x 128, one by one -> dequantised values like x, scales."""
    out, scales = torch.empty_like(x), x.new_empty(divide_up(x.shape[0], rows), divide_up(x.shape[1], GROUP))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * GROUP, (j + 1) * GROUP)
            scales[i, j] = max(x[at].abs().max().item(), FLOOR) / LARGEST
            out[at] = (x[at] / scales[i, j]).to(torch.float8_e4m3fn).to(x.dtype) * scales[i, j]
    return out, scales


# The CPU path: the same values and scales. An e4m3 value is a BF16 number, sums run group by group in FP32.


def _cpu_quantize(x: Tensor, block: int, floor: float = FLOOR) -> Quantized:
    rows, columns = x.shape
    padded = F.pad(x.float(), (0, -columns % GROUP, 0, -rows % block))
    groups = padded.view(padded.shape[0] // block, block, padded.shape[1] // GROUP, GROUP)
    scale = groups.abs().amax((1, 3)).clamp_(min=floor).div_(LARGEST)
    values = (groups / scale[:, None, :, None]).clamp_(-LARGEST, LARGEST).to(E4M3)
    return Quantized(values.view(padded.shape)[:rows].contiguous(), scale)


def _cpu_matmul(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    rows, columns = a.values.shape[0], b.values.shape[0]
    scale = b.scale if len(b.scale) == columns else b.scale.repeat_interleave(GROUP, 0)[:columns]
    total = torch.zeros(rows, columns)
    for group in range(a.scale.shape[1]):
        at = slice(group * GROUP, (group + 1) * GROUP)
        packed = cpu_matmul.pack(b.values[:, at].bfloat16(), torch.bfloat16, cpu_matmul.has_pairs())
        part = cpu_matmul.multiply(a.values[:, at].bfloat16(), packed, columns, torch.float32)
        total += part * (a.scale[:, group, None] * scale[None, :, group])
    return total.to(dtype)


# The Triton path.


@jit()
def quantize_groups(x):
    """x FP32 [..., GROUP] -> FP8 like x, scale FP32 [...]: the one definition, used by every kernel that quantises."""
    largest = tl.max(tl.abs(x), axis=len(x.shape) - 1)
    scale = tl.div_rn(tl.maximum(largest, 1e-30), 448.0)
    q = tl.clamp(tl.div_rn(x, tl.expand_dims(scale, len(x.shape) - 1)), -448.0, 448.0)
    return q.to(tl.float8e4nv), scale


@jit()
def accumulate_fp8(a, b, a_scale, b_scale, acc):
    """acc FP32 [M, N] + a [M, 128] b [128, N], both e4m3, times a_scale [M] and b_scale [N] or a scalar."""
    return acc + tl.dot(a, b) * (a_scale[:, None] * b_scale)


@jit("rows")
def _quantize_kernel(
    x_ptr, weight_ptr, row_scale_ptr, q_ptr, scale_ptr, q_t_ptr, scale_t_ptr, rows,
    K: tl.constexpr, GROUPS: tl.constexpr, PRODUCER: tl.constexpr, BY_ROWS: tl.constexpr, TRANSPOSED: tl.constexpr,
    WHOLE: tl.constexpr, SMALLEST: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_R rows and one group of columns. WHOLE: one scale for the tile, which is a weight's block, of at
    least SMALLEST / 448."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(1)
    column = group * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (column < K)[None, :]
    at = row.to(tl.int64)[:, None]
    if PRODUCER == 1:
        gate = tl.load(x_ptr + at * (2 * K) + column[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + at * (2 * K) + K + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x = kernel_sigmoid(gate) * gate * up
    else:
        x = tl.load(x_ptr + at * K + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if PRODUCER == 2:
        scale = tl.load(row_scale_ptr + row, mask=row < rows, other=0.0)
        x = x * scale[:, None] * tl.load(weight_ptr + column, mask=column < K, other=0.0).to(tl.float32)[None, :]
    if WHOLE:
        largest = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
        scale = tl.div_rn(tl.maximum(largest, SMALLEST), 448.0)
        q = tl.clamp(tl.div_rn(x, scale), -448.0, 448.0).to(tl.float8e4nv)
        tl.store(q_ptr + at * (GROUPS * 128) + column[None, :], q, mask=(row < rows)[:, None])
        tl.store(scale_ptr + tl.program_id(0) * GROUPS + group, scale)
        if TRANSPOSED:
            wide = tl.num_programs(0) * 128
            tl.store(
                q_t_ptr + column.to(tl.int64)[:, None] * wide + row[None, :], tl.trans(q), mask=(column < K)[:, None]
            )
            tl.store(scale_t_ptr + group * tl.num_programs(0) + tl.program_id(0), scale)
    else:
        if BY_ROWS:
            q, scale = quantize_groups(x)
            tl.store(q_ptr + at * (GROUPS * 128) + column[None, :], q, mask=(row < rows)[:, None])
            tl.store(scale_ptr + row * GROUPS + group, scale, mask=row < rows)
        if TRANSPOSED:
            q, scale = quantize_groups(tl.trans(x))
            tiles = tl.num_programs(0)
            at = column.to(tl.int64)[:, None] * (tiles * 128) + row[None, :]
            tl.store(q_t_ptr + at, q, mask=(column < K)[:, None])
            tl.store(scale_t_ptr + column * tiles + tl.program_id(0), scale, mask=column < K)


@jit("rows")
def _row_scale_kernel(x_ptr, scale_ptr, rows, eps, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """The scale of each row's RMSNorm, as in ops.rms_norm."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (column < K)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * K + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(scale_ptr + row, tl.rsqrt(tl.div_rn(tl.sum(x * x, axis=1), K * 1.0) + eps), mask=row < rows)


@jit("rows", "groups")
def _matmul_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, y_ptr, rows, groups,
    N: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y [rows, N] = a [rows, 128 groups] b [N, 128 groups]^T. BLOCKS: b has a scale for each block of 128 x 128, else
    for each row. Programs walk WIDE tiles of rows before the next tile of columns, which keeps both in the cache."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    strip = tl.program_id(0) // (WIDE * tiles_n)
    height = tl.minimum(tiles_m - strip * WIDE, WIDE)
    place = tl.program_id(0) % (WIDE * tiles_n)
    row = (strip * WIDE + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_n = place // height
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, 128)
    width = groups.to(tl.int64) * 128
    a_at = a_ptr + row.to(tl.int64)[:, None] * width + inner[None, :]
    b_at = b_ptr + column.to(tl.int64)[None, :] * width + inner[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for group in range(groups):
        a = tl.load(a_at + group * 128, mask=(row < rows)[:, None], other=0.0)
        b = tl.load(b_at + group * 128, mask=(column < N)[None, :], other=0.0)
        a_scale = tl.load(a_scale_ptr + row * groups + group, mask=row < rows, other=0.0)
        if BLOCKS:
            acc = accumulate_fp8(a, b, a_scale, tl.load(b_scale_ptr + tile_n * groups + group), acc)
        else:
            b_scale = tl.load(b_scale_ptr + column * groups + group, mask=column < N, other=0.0)
            acc = accumulate_fp8(a, b, a_scale, b_scale[None, :], acc)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * N + column[None, :], acc, mask=inside)


_BLOCK_M, _BLOCK_N, _WIDE = 128, 128, 8  # one tile for every number of rows: fewer than 64 would widen e4m3 to FP16
_ROW_TILE = 2048  # elements a program of _row_scale_kernel holds, where a row has no more


def _triton_quantize(
    x: Tensor, producer: Producer, weight: Tensor, row_scale: Tensor, by_rows: bool, transposed: bool
) -> tuple[Quantized | None, Quantized | None]:
    rows, columns = x.shape[0], x.shape[1] // (2 if producer is Producer.SWIGLU else 1)
    groups, block = divide_up(columns, GROUP), GROUP if transposed else 16
    tiles = divide_up(rows, block)
    plain = _empty(x, rows, groups) if by_rows else None
    turned = _empty(x, columns, tiles) if transposed else None
    outputs = [y for q in (plain or turned, turned or plain) if q is not None for y in (q.values, q.scale)]
    launch(
        _quantize_kernel, (tiles, groups), x, weight, row_scale, *outputs, rows, K=columns, GROUPS=groups,
        PRODUCER=int(producer), BY_ROWS=by_rows, TRANSPOSED=transposed, WHOLE=False, SMALLEST=FLOOR,
        BLOCK_R=block, warps=8 if transposed else 4,
    )  # fmt: skip
    return plain, turned


def _empty(x: Tensor, rows: int, groups: int) -> Quantized:
    return Quantized(like(x, rows, groups * GROUP, dtype=E4M3), like(x, rows, groups))


def _row_scale(x: Tensor, eps: float) -> Tensor:
    rows, columns = x.shape
    block = next_power_of_two(columns)
    block_r = max(1, _ROW_TILE // block)
    scale = like(x, rows)
    launch(
        _row_scale_kernel, (divide_up(rows, block_r),), x, scale, rows, eps, K=columns, BLOCK_R=block_r, BLOCK_K=block,
        warps=4 if block <= _ROW_TILE else 8,
    )  # fmt: skip
    return scale


def _triton_matmul(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    rows, columns, groups = a.values.shape[0], b.values.shape[0], a.scale.shape[1]
    blocks = len(b.scale) != columns
    block_n, warps = (_BLOCK_N, 8) if blocks else (_BLOCK_N // 2, 4)  # a scale for each row takes registers
    y = like(a.values, rows, columns, dtype=dtype)
    launch(
        _matmul_kernel, (divide_up(rows, _BLOCK_M) * divide_up(columns, block_n),), a.values, a.scale, b.values,
        b.scale, y, rows, groups, N=columns, BLOCKS=blocks, BLOCK_M=_BLOCK_M, BLOCK_N=block_n, WIDE=_WIDE,
        warps=warps, stages=4,
    )  # fmt: skip
    return y


# Both paths.


def _produce(x: Tensor, producer: Producer, norm_weight: Tensor | None, eps: float) -> Tensor:
    if producer is Producer.SWIGLU:
        return swiglu(x)
    if producer is Producer.RMS_NORM:
        assert norm_weight is not None
        return rms_norm(x, norm_weight, eps)
    return x


def _quantize(
    x: Tensor, producer: Producer, norm_weight: Tensor | None, eps: float, by_rows: bool, transposed: bool
) -> tuple[Quantized | None, Quantized | None]:
    x = aligned(x)
    if choose("fp8", x) is Path.TRITON:
        row_scale = _row_scale(x, eps) if producer is Producer.RMS_NORM else x
        weight = x if norm_weight is None else aligned(norm_weight)
        return _triton_quantize(x, producer, weight, row_scale, by_rows, transposed)
    # SwiGLU rounds to the dtype of gate_up when it stands alone; here, as in the kernel, it stays in FP32.
    x = _produce(x.float(), producer, norm_weight, eps)
    plain = _cpu_quantize(x, 1) if by_rows else None
    return plain, (_cpu_quantize(x.t().contiguous(), 1) if transposed else None)


def _matmul(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    triton_path = choose("fp8", a.values) is Path.TRITON
    return _triton_matmul(a, b, dtype) if triton_path else _cpu_matmul(a, b, dtype)


def quantize_rows(x: Tensor) -> Quantized:
    """x [M, K] of any float dtype, in groups of 1 x 128."""
    plain, _ = _quantize(x, Producer.NONE, None, 0.0, by_rows=True, transposed=False)
    assert plain is not None
    return plain


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    """quantize_rows(rms_norm(x, weight, eps)) for x [M, K] in one pass, without gradient."""
    plain, _ = _quantize(x, Producer.RMS_NORM, weight, eps, by_rows=True, transposed=False)
    assert plain is not None
    return plain


def swiglu_quantize(gate_up: Tensor) -> Quantized:
    """quantize_rows(swiglu(gate_up)) for gate_up [M, 2K], FP32 in between, in one pass, without gradient."""
    plain, _ = _quantize(gate_up, Producer.SWIGLU, None, 0.0, by_rows=True, transposed=False)
    assert plain is not None
    return plain


def quantize_weight(weight: Tensor, for_training: bool = False, floor: float = FLOOR) -> Fp8Weight:
    """weight [N, K] in blocks of 128 x 128, also transposed where gradients of the input are wanted.

    floor: the least max |x| that a scale is made from; checkpoints have their own.
    """
    weight, (rows, columns) = aligned(weight.detach()), weight.shape
    if choose("fp8", weight) is not Path.TRITON:
        plain = _cpu_quantize(weight, GROUP, floor)
        turned = _cpu_quantize(weight.t().contiguous(), GROUP, floor) if for_training else None
        return Fp8Weight(plain, turned, (rows, columns))
    tiles, groups = divide_up(rows, GROUP), divide_up(columns, GROUP)
    plain = Quantized(like(weight, rows, groups * GROUP, dtype=E4M3), like(weight, tiles, groups))
    turned = Quantized(like(weight, columns, tiles * GROUP, dtype=E4M3), like(weight, groups, tiles))
    launch(
        _quantize_kernel, (tiles, groups), weight, weight, weight, plain.values, plain.scale, turned.values,
        turned.scale, rows, K=columns, GROUPS=groups, PRODUCER=0, BY_ROWS=True, TRANSPOSED=for_training, WHOLE=True,
        SMALLEST=floor, BLOCK_R=GROUP, warps=8,
    )  # fmt: skip
    return Fp8Weight(plain, turned if for_training else None, (rows, columns))


def fp8_matmul(x: Quantized, weight: Fp8Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x of `quantize_rows` [M, K] times weight^T -> [M, N] in `dtype`, without gradient."""
    return _matmul(x, weight.rows, dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float, producer: Producer, recompute: bool
    ) -> Tensor:
        training = ctx.needs_input_grad[1]
        plain, turned = _quantize(x, producer, norm_weight, eps, by_rows=True, transposed=training and not recompute)
        quantized = quantize_weight(weight, for_training=ctx.needs_input_grad[0])
        assert plain is not None
        ctx.producer, ctx.eps, ctx.recompute, ctx.weight = producer, eps, recompute, quantized
        ctx.weight_dtype = weight.dtype
        keep_x = recompute or producer is not Producer.NONE
        ctx.dtype = x.dtype
        ctx.save_for_backward(
            x if keep_x else None, norm_weight, *(() if turned is None else (turned.values, turned.scale))
        )
        return _matmul(plain, quantized.rows, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, *turned = ctx.saved_tensors
        by_rows, by_columns = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_rows, grad_turned = _quantize(grad, Producer.NONE, None, 0.0, by_rows, by_columns)
        grad_weight = None
        if by_columns:
            if ctx.recompute:
                _, recomputed = _quantize(x, ctx.producer, norm_weight, ctx.eps, by_rows=False, transposed=True)
            else:
                recomputed = Quantized(*turned)
            assert grad_turned is not None and recomputed is not None
            grad_weight = _matmul(grad_turned, recomputed, torch.float32).to(ctx.weight_dtype)
        if not by_rows:
            return None, grad_weight, None, None, None, None
        assert grad_rows is not None and ctx.weight.transposed is not None
        inner = _matmul(grad_rows, ctx.weight.transposed, torch.float32)
        if ctx.producer is Producer.NONE:
            return inner.to(ctx.dtype), grad_weight, None, None, None, None
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in (x, norm_weight) if each is not None]
            produced = _produce(leaves[0], ctx.producer, leaves[-1], ctx.eps)
        grads = torch.autograd.grad(produced, leaves, inner.to(produced.dtype))
        return grads[0], grad_weight, grads[1] if len(grads) > 1 else None, None, None, None


def fp8_linear(x: Tensor, weight: Tensor, recompute: bool = False) -> Tensor:
    """x [..., K], weight [N, K] of any float dtype -> BF16 [..., N]; gradients in the dtypes of x and weight.

    recompute: keep x for the backward pass, which quantises it again, instead of its transposed e4m3 values: right
    where x is kept anyway.
    """
    y: Tensor = apply(_Fp8Linear, x.reshape(-1, x.shape[-1]), weight, None, 0.0, Producer.NONE, recompute)
    return y.view(*x.shape[:-1], -1)


def rms_norm_fp8_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """fp8_linear(rms_norm(x)) for x [T, K]: keeps x alone, forward emits rows only, backward the transposed only."""
    y: Tensor = apply(_Fp8Linear, x, weight, norm_weight, eps, Producer.RMS_NORM, True)
    return y


def swiglu_fp8_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """fp8_linear(swiglu(gate_up)) for gate_up [T, 2K]: keeps gate_up alone."""
    y: Tensor = apply(_Fp8Linear, gate_up, weight, None, 0.0, Producer.SWIGLU, True)
    return y
