"""Blockwise FP8 (report 3.2; the recipe of DeepSeek-V3, 2412.19437): e4m3 values with one FP32 scale for a group.

    scale = max(max |x|, FLOOR) / 448        q = round_to_nearest_even(x / scale), saturating at +-448

Activations and gradients in groups of 1 x 128, weights in blocks of 128 x 128. Local to its group, so aligned (A6).
"""

from ops.jit import jit, tl

GROUP = 128
LARGEST = 448.0
FLOOR = 1e-30  # keeps the scale of a group of zeros away from 0


@jit()
def quantize_groups(x):
    """x FP32 [..., GROUP] -> FP8 like x, scale FP32 [...]: the one definition, used by every kernel that quantises."""
    largest = tl.max(tl.abs(x), axis=len(x.shape) - 1)
    scale = tl.div_rn(tl.maximum(largest, 1e-30), 448.0)
    q = tl.clamp(tl.div_rn(x, tl.expand_dims(scale, len(x.shape) - 1)), -448.0, 448.0)
    return q.to(tl.float8e4nv), scale
