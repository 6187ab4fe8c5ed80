"""Elementwise pieces whose bits do not depend on where a value lies in memory. Private to `ops`.

torch's own CPU sigmoid and silu use a vector routine for the body of a tensor and a scalar one for its tail, which
differ in the last bit (measured: 128 of 300 tail lengths). exp takes one routine for both, and +, -, *, / are exact to
the bit, so everything here is built from those. A strided tensor would take another route: arguments must be
contiguous.
"""

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) for contiguous x."""
    return torch.neg(x.contiguous()).exp_().add_(1.0).reciprocal_()
