"""Which implementation of an operator runs: the one decision point, what it decided and why.

    cpu     our kernels, compiled by Numba; tensors on a CPU
    triton  our kernels; tensors on a GPU
    fast    what a user would pick who needs no alignment; only for operators named in `use_fast`

An operator asks once per call. Nothing else in `ops` looks at devices or settings.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum

import torch
from torch import Tensor

from ops.jit import triton


class Path(StrEnum):
    CPU = "cpu"
    TRITON = "triton"
    FAST = "fast"


# Operators with a fast form, and what that form is.
FAST_FORMS = {
    "linear": "stock matrix product without padding (cuBLAS on a GPU)",
    "rms_norm": "torch.nn.functional.rms_norm",
    "softmax_attention": "torch scaled_dot_product_attention",
    "lightning_attention": "token recurrence in decode, no open chunk",
}

_fast: frozenset[str] = frozenset()
_forced: Path | None = None


def choose(operator: str, x: Tensor) -> Path:
    """The path of this call. Raises RuntimeError for a GPU tensor without Triton."""
    if operator in _fast:
        return Path.FAST
    if _forced is not None:
        return _forced
    if not x.is_cuda:
        return Path.CPU
    if triton is None:
        raise RuntimeError(f"{operator} on {x.device} needs Triton, which is not installed: pip install triton")
    return Path.TRITON


def explain(operator: str, x: Tensor) -> str:
    """The choice in words, for `doctor` and reports."""
    path = choose(operator, x)
    why = {
        Path.FAST: f"chosen by setting, not aligned: {FAST_FORMS.get(operator)}",
        Path.TRITON: "forced by a test" if _forced else f"{x.device} is a GPU",
        Path.CPU: "forced by a test" if _forced else f"{x.device} has no Triton",
    }
    return f"{operator}: {path} ({why[path]})"


def use_fast(operators: Iterable[str]) -> None:
    """Gives up alignment in the named operators of this process, from the next call on; all others are aligned.

    Raises ValueError for an operator that has no fast form.
    """
    global _fast
    names = frozenset(operators)
    if unknown := sorted(names - FAST_FORMS.keys()):
        raise ValueError(f"no fast form of {', '.join(unknown)}; there is one of {', '.join(FAST_FORMS)}")
    _fast = names


def is_fast(operator: str) -> bool:
    """Has `use_fast` given up alignment in it?"""
    return operator in _fast


def can_record(device: torch.device) -> bool:
    """May a step there be recorded and replayed? On a CPU only our own kernels read lengths anew (`ops.recording`)."""
    return device.type == "cuda" or not (_fast or _forced is Path.TRITON)


@contextmanager
def force(path: Path) -> Iterator[None]:
    """For tests: every operator takes `path`, wherever its tensors are."""
    global _forced
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before
