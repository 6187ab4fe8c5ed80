"""The part of `lockstep doctor` that says which implementation of each operator a run here would take, and why."""

from collections.abc import Iterator

import torch

import ops
from policy.machine import choose_device
from rl.doctor_check import Check

OPERATORS = (
    "linear",
    "rms_norm",
    "swiglu",
    "qk_norm_rope",
    "lightning_attention",
    "softmax_attention",
    "route",
    "experts",
    "log_probs",
    "sample",
    "cross_entropy",
    "gradient_norm",
    "clip_gradients",
    "fp8",
)


def path_checks() -> Iterator[Check]:
    x = torch.empty(0, device=choose_device("auto"))
    for operator in OPERATORS:
        try:
            yield Check(f"{operator}, path", True, ops.explain(operator, x).partition(": ")[2])
        except RuntimeError as error:  # a GPU without Triton
            yield Check(f"{operator}, path", False, str(error), "run `pip install 'lockstep-rl[gpu]'`")
