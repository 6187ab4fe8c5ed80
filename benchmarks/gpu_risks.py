"""Reports about compilers and libraries that concern kernels like ours, each tried on the GPU at hand.

    rows at a power of two   a fixed-tile product gave a subset of rows other bits where K was one (vLLM #55131, open)
    integers are exact       a wgmma that reads its operand too early gives wrong products (Triton #11781); products and
                             sums of small integers are exact in FP32, so any error shows

A check returns None, or what is wrong in words.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import ops
from benchmarks.gpu_checks import same_bits

DTYPES = (torch.bfloat16, torch.float32)
LARGEST = 7  # 448 / 7 is a power of two, so e4m3 holds every integer up to it, scaled, exactly


def rows_at_a_power_of_two(device: torch.device, rows: int = 256, width: int = 3072) -> str | None:
    for dtype in DTYPES:
        for inner in (512, 1024, 2048, 4096):
            x, weight = torch.randn(rows, inner, device=device).to(dtype), torch.randn(width, inner, device=device)
            whole = ops.linear(x, weight, dtype)
            for first, count in ((0, 1), (3, 17), (rows // 2, rows // 4)):
                part = ops.linear(x[first : first + count], weight, dtype)
                if not same_bits(whole[first : first + count], part):
                    return f"{dtype}, K = {inner}: rows {first} to {first + count - 1} differ when they are alone"
    return None


def integers_in_linear(device: torch.device, rows: int = 1000, width: int = 1536, inner: int = 2048) -> str | None:
    """Forward and both gradients; in BF16 each is the exact one, rounded."""
    for dtype in DTYPES:
        x, weight = (_integers(count, inner, device).to(dtype).requires_grad_() for count in (rows, width))
        grad = _integers(rows, width, device).to(dtype)
        y = ops.linear(x, weight, dtype)
        got = y, *torch.autograd.grad(y, (x, weight), grad)
        want = x.double() @ weight.double().t(), grad.double() @ weight.double(), grad.double().t() @ x.double()
        for name, one, other in zip(("y", "dx", "dW"), got, want, strict=True):
            if wrong := int((one != other.to(dtype)).sum()):
                return f"{name} in {dtype} is wrong in {wrong} numbers"
    return None


def integers_in_fp8(device: torch.device, rows: int = 1000, width: int = 1536, inner: int = 2048) -> str | None:
    x, weight = _integers(rows, inner, device), _integers(width, inner, device)
    x[:, ::128], weight[:, ::128] = LARGEST, LARGEST  # one in each group, so that every scale is LARGEST / 448
    got = ops.fp8_matmul(ops.quantize_rows(x), ops.quantize_weight(weight))
    want = (x.double() @ weight.double().t()).to(got.dtype)
    return None if torch.equal(got, want) else f"{int((got != want).sum())} numbers are wrong"


def _integers(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randint(-LARGEST, LARGEST + 1, (rows, columns), device=device).float()


RISKS: dict[str, tuple[str, Callable[[torch.device], str | None]]] = {
    "rows at a power of two": ("linear", rows_at_a_power_of_two),
    "integers are exact, linear": ("linear", integers_in_linear),
    "integers are exact, fp8": ("fp8", integers_in_fp8),
}
