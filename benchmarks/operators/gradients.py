"""Cases of gradient norm and clipping: a gradient of 2 GiB in FP32, as the matrices and the norm weights of 20 layers
of Ring-mini-linear would bring it (the experts of a layer in three tensors)."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.operators.case import Case, empty
from ops.gradients import clip_gradients, gradient_norm

SHAPES = [shape for _ in range(20) for shape in ((6144, 2048), (2048, 2048), (512, 5120), (2048,), (2048,), (128,))]
NUMBERS = sum(torch.Size(shape).numel() for shape in SHAPES)


def _tensors(device: torch.device) -> list[Tensor]:
    return [empty(*shape)(device) for shape in SHAPES]


def _norm_inputs(device: torch.device) -> tuple[object, ...]:
    return (_tensors(device),)


def _clip_inputs(device: torch.device) -> tuple[object, ...]:
    return _tensors(device), 1.0, torch.tensor([2.0]).to(device)[0]


def _cpu_norm() -> Callable[..., object]:
    return lambda tensors: torch.nn.utils.get_total_norm(tensors, foreach=True)


def _linghe() -> Callable[..., object]:
    from linghe.utils.reduce import triton_batch_norm

    return triton_batch_norm


def _cpu_clip() -> Callable[..., object]:
    def run(tensors: list[Tensor], max_norm: float, norm: Tensor) -> None:
        torch._foreach_mul_(tensors, (max_norm / (norm + 1e-6)).clamp(max=1.0))

    return run


CASES = [
    Case(
        "gradients", "norm", f"{len(SHAPES)} tensors, {NUMBERS / 1e6:.0f}M", _norm_inputs, gradient_norm,
        bytes=4.0 * NUMBERS, dtype="float32", peers={"torch": _cpu_norm, "linghe": _linghe},
    ),
    Case(
        "gradients", "clip", f"{len(SHAPES)} tensors, {NUMBERS / 1e6:.0f}M", _clip_inputs, clip_gradients,
        bytes=8.0 * NUMBERS, dtype="float32", peers={"torch": _cpu_clip},
    ),
]  # fmt: skip
