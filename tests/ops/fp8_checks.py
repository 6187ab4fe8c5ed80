"""FP8 checks that hold on both paths: what quantisation must give, and products against FP64 of the same values."""

import torch
from torch import Tensor

from ops.fp8 import Quantized
from tests.ops.checks import UNIT, assert_within

U = UNIT[torch.float32]


def awkward(rows: int, columns: int) -> Tensor:
    """Groups of very different size, a group of zeros, one of subnormals, ties between two e4m3 values."""
    x = torch.randn(rows, columns) * torch.exp(torch.randn(rows, 1) * 3)
    x[0, :128] = 0.0
    x[1, : min(columns, 128)] = 1e-39
    steps = torch.arange(min(columns, 128)) * 0.0625 + 8.5  # between neighbours one apart lie halves and quarters
    x[2, : len(steps)] = steps
    x[2, 0] = 448.0
    return x


def assert_product(y: Tensor, a: Quantized, b: Quantized) -> None:
    """Exact e4m3 values, so: 128 FP32 additions in a group, two roundings of scales, G additions of groups; then, for
    BF16, one rounding."""
    left, right = a.dequantize(a.values.shape[1]).double().cpu(), b.dequantize(b.values.shape[1]).double().cpu()
    groups = a.scale.shape[1]
    rounding = 2.0**-8 if y.dtype == torch.bfloat16 else 0.0
    want = left @ right.t()
    assert_within(y.cpu(), want, (130 + groups) * U * (left.abs() @ right.abs().t()) + rounding * want.abs())
