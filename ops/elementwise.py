"""Elementwise pieces whose bits do not depend on where a value lies in memory. Private to `ops`.

torch's own CPU sigmoid and silu use a vector routine for the body of a tensor and a scalar one for its tail, which
differ in the last bit (measured: 128 of 300 tail lengths). exp takes one routine for both, and +, -, *, / are exact to
the bit, so everything here is built from those. A strided tensor would take another route: arguments must be
contiguous.
"""

import torch
from torch import Tensor

from ops.jit import jit, tl


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) for contiguous x."""
    return torch.neg(x.contiguous()).exp_().add_(1.0).reciprocal_()


@jit()
def kernel_sigmoid(x):
    """The same inside a kernel; div_rn, because the plain division of a GPU is approximate."""
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))
