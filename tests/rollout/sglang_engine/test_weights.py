"""How weights are cut up for SGLang, and how its layers hold them."""

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.sglang_engine import weights as sglang_weights
from rollout.sglang_engine.weights import buckets, checksums, fused, write_weights


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(4, 200))
def test_buckets_hold_every_tensor_once_in_order_and_not_too_much(sizes: list[int], most: int) -> None:
    given_tensors = {str(index): torch.full((size,), float(index)) for index, size in enumerate(sizes)}
    found = list(buckets(given_tensors, most))
    assert [name for bucket in found for name in bucket] == list(given_tensors)
    assert all(bucket for bucket in found)
    assert all(sum(each.nbytes for each in bucket.values()) <= most or len(bucket) == 1 for bucket in found)


def test_matrices_are_joined_and_padded_as_its_layers_have_them() -> None:
    ones = torch.ones
    given_tensors = {
        "model.embed_tokens.weight": ones(3, 2),
        "l.self_attn.v_proj.weight": ones(1, 2) * 3,
        "l.self_attn.q_proj.weight": ones(2, 2),
        "l.self_attn.k_proj.weight": ones(1, 2) * 2,
        "l.mlp.gate_proj.weight": ones(2, 2) * 4,
        "l.mlp.up_proj.weight": ones(2, 2) * 5,
        "l.mlp.down_proj.weight": ones(2, 2) * 6,
        "m.mlp.experts.1.gate_proj.weight": ones(1, 2) * 9,
        "m.mlp.experts.0.up_proj.weight": ones(1, 2) * 8,
        "m.mlp.experts.0.gate_proj.weight": ones(1, 2) * 7,
        "m.mlp.experts.1.up_proj.weight": ones(1, 2) * 10,
        "m.mlp.experts.10.down_proj.weight": ones(2, 1) * 12,
        "m.mlp.experts.2.down_proj.weight": ones(2, 1) * 11,
        "model.norm.weight": ones(2),
    }
    found = {name: (list(tensor.shape), tensor[..., 0].flatten().tolist()) for name, tensor in fused(given_tensors)}
    zeros = [0.0]
    assert found == {
        "model.embed_tokens.weight": ([64, 2], [1.0] * 3 + zeros * 61),
        "model.norm.weight": ([2], [1.0]),
        "l.self_attn.qkv_proj.weight": ([4, 2], [1.0, 1.0, 2.0, 3.0]),
        "l.mlp.gate_up_proj.weight": ([64, 2], [4.0] * 2 + zeros * 30 + [5.0] * 2 + zeros * 30),
        "l.mlp.down_proj.weight": ([2, 32], [6.0] * 2),
        "m.mlp.experts.w13_weight": (
            [128, 2],
            [number for each in (7.0, 8.0, 9.0, 10.0) for number in [each] + zeros * 31],
        ),
        "m.mlp.experts.w2_weight": ([4, 32], [11.0, 11.0, 12.0, 12.0]),
    }


def test_a_checksum_is_of_the_bytes_in_the_engines_dtype() -> None:
    tensor = torch.tensor([1.0, 2.0])
    expected = hashlib.sha256(tensor.bfloat16().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    assert checksums({"model.norm.weight": tensor}, torch.bfloat16) == {"model.norm.weight": expected}


def test_a_file_that_is_not_what_was_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = sglang_weights.load_file
    monkeypatch.setattr(sglang_weights, "load_file", lambda path: {k: v + 1 for k, v in read(path).items()})
    with pytest.raises(ValueError, match="holds other weights than were written"):
        write_weights(tmp_path, {"a": torch.ones(2)})
