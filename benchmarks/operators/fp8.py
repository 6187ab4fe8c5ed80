"""Cases of blockwise FP8: the target shape 8192^3, and the widths of Ring-mini-linear."""

from collections.abc import Callable

import torch

from benchmarks.operators.case import FP8_TARGETS, Case, backward, empty, rows_at
from ops import fp8

TOKENS, D = 8192, 2048
TARGETS = FP8_TARGETS


def _matmul_inputs(rows: int, columns: int, inner: int) -> Callable[[torch.device], tuple[object, ...]]:
    def make(device: torch.device) -> tuple[object, ...]:
        x, weight = (
            empty(rows, inner, dtype=torch.bfloat16)(device),
            empty(columns, inner, dtype=torch.bfloat16)(device),
        )
        return fp8.quantize_rows(x), fp8.quantize_weight(weight)

    return make


def _cublas() -> Callable[..., object]:
    def run(x: fp8.Quantized, weight: fp8.Fp8Weight) -> torch.Tensor:
        scale = x.scale.new_ones(())
        return torch._scaled_mm(
            x.values, weight.rows.values.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16
        )

    return run


def _matmul(rows: int, columns: int, inner: int) -> Case:
    return Case(
        "fp8", "matmul", f"M{rows} N{columns} K{inner}", _matmul_inputs(rows, columns, inner), fp8.fp8_matmul,
        bytes=rows * inner + columns * inner + 2.0 * rows * columns, flops=2.0 * rows * columns * inner,
        dtype="float8", peers={"cuBLAS, one scale for a tensor": _cublas}, rows=rows_at(rows, 0),
    )  # fmt: skip


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return fp8.fp8_linear(x, weight)


def _fused(x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return fp8.rms_norm_fp8_linear(x, norm, 1e-6, weight)


CASES = [
    _matmul(8192, 8192, 8192),
    _matmul(8192, 6144, 2048),
    _matmul(64, 6144, 2048),
    Case(
        "fp8", "quantize rows", "T8192 D2048", lambda d: (empty(TOKENS, D, dtype=torch.bfloat16)(d),),
        fp8.quantize_rows, bytes=TOKENS * D * 3.0, rows=rows_at(TOKENS, 0),
    ),
    Case(
        "fp8", "rms_norm + quantize", "T8192 D2048", lambda d: (empty(TOKENS, D)(d), empty(D)(d)),
        lambda x, weight: fp8.rms_norm_quantize(x, weight, 1e-6), bytes=TOKENS * D * 5.0,
        rows=rows_at(TOKENS, 0),
    ),
    Case(
        "fp8", "swiglu + quantize", "T8192 F5120", lambda d: (empty(TOKENS, 10240, dtype=torch.bfloat16)(d),),
        fp8.swiglu_quantize, bytes=TOKENS * 5120 * 5.0, rows=rows_at(TOKENS, 0),
    ),
    Case(
        "fp8", "linear both", "T8192 N6144 K2048",
        lambda d: (empty(TOKENS, D, dtype=torch.bfloat16)(d), empty(6144, D)(d)), backward(_linear),
        flops=6.0 * TOKENS * 6144 * D, dtype="float8",
    ),
    Case(
        "fp8", "rms_norm + linear both", "T8192 N6144 K2048",
        lambda d: (empty(TOKENS, D)(d), empty(D)(d), empty(6144, D)(d)), backward(_fused),
        flops=6.0 * TOKENS * 6144 * D, dtype="float8",
    ),
]  # fmt: skip
