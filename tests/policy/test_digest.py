"""Digests: of the content, all of the content and nothing but the content."""

import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from policy.digest import tensor_digest, weights_digest


@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]))
def test_digest_changes_with_any_bit(data: st.DataObject, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype).view(2, 3)
    digest = tensor_digest(tensor)
    content = tensor.view(torch.uint8)
    byte, bit = data.draw(st.integers(0, content.numel() - 1)), data.draw(st.integers(0, 7))
    content.view(-1)[byte] ^= 1 << bit
    assert tensor_digest(tensor) != digest
    content.view(-1)[byte] ^= 1 << bit
    assert tensor_digest(tensor) == digest


def test_hand_worked() -> None:
    """Digests are written to disk, so what they are of may not change: 1.0 and -2.0 in little-endian FP32."""
    content = b"torch.float32 [2, 1] " + bytes.fromhex("0000803f 000000c0")
    assert tensor_digest(torch.tensor([[1.0], [-2.0]])) == hashlib.sha256(content).hexdigest()
    assert tensor_digest(torch.zeros(0)) == hashlib.sha256(b"torch.float32 [0] ").hexdigest()


def test_digest_covers_shape_and_dtype_but_not_layout() -> None:
    tensor = torch.zeros(2, 3)
    others = [tensor.t(), tensor.view(6), tensor.int(), tensor[:1]]
    assert len({tensor_digest(t) for t in (tensor, *others)}) == 5
    filled = torch.arange(6.0).view(2, 3)
    assert tensor_digest(filled.t().contiguous().t()) == tensor_digest(filled)


def test_weights_digest_names_the_content() -> None:
    digests = {"a": "1", "b": "2", "c": "3"}
    total = weights_digest(digests)
    assert total == weights_digest({"c": "3", "a": "1", "b": "2"})
    assert len({total, weights_digest(digests | {"a": "2", "b": "1"}), weights_digest({"a": "1", "b": "2"})}) == 3
