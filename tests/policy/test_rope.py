"""Rotary angles: the llama3 scaling by hand, and as transformers has it."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import ops
from policy.rope import Llama3Scaling

SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def test_stretch_by_hand() -> None:
    """By turns within 8192 positions: 4 and more are kept, 1 and less divided by 8, 2.5 is half of each: 9/16."""
    turns = torch.tensor([1000.0, 4.0, 2.5, 1.0, 0.5, 1e-3], dtype=torch.float64)
    inverse = turns * 2 * math.pi / 8192
    expected = [1.0, 1.0, 0.5625, 0.125, 0.125, 0.125]
    assert (SCALING.stretch(inverse) / inverse).tolist() == pytest.approx(expected, rel=1e-12)


def test_angles_are_those_of_transformers() -> None:
    """Which computes them in FP32: a power, a product and a sum of relative error 2^-24 each, the exponent's times
    log(theta) = 13."""
    fields = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**fields, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    ours = SCALING.stretch(500000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128))
    assert (ours / theirs.double() - 1).abs().max() < 16 * 2**-24


def test_table_is_rounded_once() -> None:
    """Position 100,000, the fastest pair, which the scaling keeps: cosine and sine of 100,000 radians."""
    table = ops.rope_table(100_001, 128, 500000.0, SCALING.stretch)
    assert (table.shape, table.dtype) == ((100_001, 2, 64), torch.float32)
    assert table[100_000, :, 0].tolist() == torch.tensor([math.cos(1e5), math.sin(1e5)]).tolist()
    slowest = 1e5 * 500000.0 ** (-126 / 128) / 8
    assert table[100_000, :, 63].tolist() == torch.tensor([math.cos(slowest), math.sin(slowest)]).tolist()


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ((0.5, 1.0, 4.0, 8192), "factor must be at least 1"),
        ((8.0, 4.0, 4.0, 8192), "low_freq_factor must lie between 0 and high_freq_factor"),
        ((8.0, 0.0, 4.0, 8192), "low_freq_factor must lie between 0 and high_freq_factor"),
        ((8.0, 1.0, 4.0, 0), "original_max_position_embeddings must be at least 1"),
    ],
)
def test_impossible_scaling_is_refused(fields: tuple[float, float, float, int], rule: str) -> None:
    with pytest.raises(ValueError, match=f"rope_scaling: {rule}"):
        Llama3Scaling(*fields)
