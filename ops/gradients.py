"""Norm and clipping of all gradients at once (Pascanu et al., 1211.5063).

    norm = sqrt(sum of x^2 over all tensors)        x <- x min(1, max_norm / (norm + 1e-6))

On a GPU a table of addresses names every block of every tensor, so that one launch serves all tensors of a kind.
Squares are added up in FP64, one sum for each block, and these in one fixed order. Nothing is read back to the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ops.dispatch import Path, choose
from ops.jit import ALIGNMENT, jit, launch, like, tl, triton_dtype

EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


def gradient_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors]).square().sum().sqrt()


# The Triton path.

BLOCK = 65536  # numbers of a tensor that one program takes
_STEP = 4096  # of them at once


@dataclass(frozen=True)
class _Kind:
    """Tensors of one type, whose blocks can or cannot be read 16 bytes at a time: one launch."""

    dtype: torch.dtype
    vector: int  # numbers that are read at once

    @classmethod
    def of(cls, x: Tensor) -> "_Kind":
        vector = ALIGNMENT // x.itemsize
        return cls(x.dtype, vector if x.data_ptr() % ALIGNMENT == 0 and x.numel() % vector == 0 else 1)


@jit()
def _block(table_ptr, block, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Where a block begins, and its length."""
    pointer = tl.load(table_ptr + 2 * block).to(tl.pointer_type(DTYPE))
    size = tl.load(table_ptr + 2 * block + 1).to(tl.int32)
    if VECTOR > 1:
        pointer, size = tl.multiple_of(pointer, 16), tl.multiple_of(size, VECTOR)
    return pointer, size


@jit("first")
def _squares_kernel(table_ptr, sums_ptr, first, DTYPE: tl.constexpr, VECTOR: tl.constexpr, STEP: tl.constexpr):
    block = first + tl.program_id(0)
    pointer, size = _block(table_ptr, block, DTYPE, VECTOR)
    total = tl.zeros([STEP], dtype=tl.float64)
    for begin in tl.range(0, size, STEP, num_stages=3):
        at = begin + tl.arange(0, STEP)
        x = tl.load(pointer + at, mask=at < size, other=0.0).to(tl.float64)
        total += x * x
    tl.store(sums_ptr + block, tl.sum(total, axis=0))


@jit("blocks")
def _norm_kernel(sums_ptr, norm_ptr, blocks, STEP: tl.constexpr):
    total = tl.zeros([STEP], dtype=tl.float64)
    for begin in tl.range(0, blocks, STEP, num_stages=2):
        at = begin + tl.arange(0, STEP)
        total += tl.load(sums_ptr + at, mask=at < blocks, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))


@jit("first")
def _clip_kernel(
    table_ptr, norm_ptr, max_norm, first, EPS: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    scale = tl.div_rn(max_norm, tl.load(norm_ptr) + EPS)
    if scale < 1.0:
        pointer, size = _block(table_ptr, first + tl.program_id(0), DTYPE, VECTOR)
        for begin in tl.range(0, size, STEP, num_stages=3):
            at = begin + tl.arange(0, STEP)
            x = tl.load(pointer + at, mask=at < size, other=0.0).to(tl.float32)
            tl.store(pointer + at, x * scale, mask=at < size)


def _table(tensors: Sequence[Tensor]) -> tuple[Tensor, dict[_Kind, tuple[int, int]]]:
    """Address and length of each block, kind by kind, int64 [N, 2]; each kind's first block and number of blocks."""
    by_kind: dict[_Kind, list[Tensor]] = {}
    for x in tensors:
        assert x.is_contiguous(), "a gradient is laid out as its parameter"
        by_kind.setdefault(_Kind.of(x), []).append(x)
    rows: list[np.ndarray] = []
    spans: dict[_Kind, tuple[int, int]] = {}
    for kind, members in by_kind.items():
        first = sum(map(len, rows))
        rows += [_blocks(x) for x in members]
        spans[kind] = first, sum(map(len, rows)) - first
    return torch.from_numpy(np.concatenate(rows)).to(tensors[0].device), spans


def _blocks(x: Tensor) -> np.ndarray:
    first = np.arange(0, x.numel(), BLOCK, dtype=np.int64)
    return np.stack([x.data_ptr() + first * x.itemsize, np.minimum(x.numel() - first, BLOCK)], axis=1)


def _triton_norm(tensors: Sequence[Tensor]) -> Tensor:
    table, spans = _table(tensors)
    sums, norm = like(table, len(table), dtype=torch.float64), like(table, 1)
    for kind, (first, blocks) in spans.items():
        constants = {"DTYPE": triton_dtype(kind.dtype), "VECTOR": kind.vector, "STEP": _STEP}
        launch(_squares_kernel, (blocks,), table, sums, first, **constants)
    launch(_norm_kernel, (1,), sums, norm, len(table), STEP=_STEP)
    return norm[0]


def _triton_clip(tensors: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    table, spans = _table(tensors)
    for kind, (first, blocks) in spans.items():
        constants = {"DTYPE": triton_dtype(kind.dtype), "VECTOR": kind.vector, "STEP": _STEP}
        launch(_clip_kernel, (blocks,), table, norm, max_norm, first, EPS=EPSILON, **constants)


@torch.no_grad()
def gradient_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all numbers in `tensors` (contiguous, float32 or bfloat16), an FP32 scalar; of no tensors, 0."""
    if tensors and choose("gradient_norm", tensors[0]) is Path.TRITON:
        return _triton_norm(tensors)
    return get_total_norm(tensors)


@torch.no_grad()
def clip_gradients(tensors: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scales `tensors` in place so that their norm, which is `norm` and finite, is at most `max_norm`."""
    if tensors and choose("clip_gradients", tensors[0]) is Path.TRITON:
        return _triton_clip(tensors, max_norm, norm)
    scale = (max_norm / (norm + EPSILON)).clamp(max=1.0)
    for x in tensors:
        x.mul_(scale)
