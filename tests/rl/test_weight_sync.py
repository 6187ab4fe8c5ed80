"""Weights through a package and back: every bit, and every damage found."""

import pickle
from dataclasses import replace

import pytest
import torch

from policy.digest import tensor_digest, weights_digest
from rl.weight_sync import WeightPackage, pack_weights, unpack_weights

TENSORS = {
    "bf16": torch.randn(3, 5).to(torch.bfloat16),
    "fp32": torch.tensor([0.1, -0.0, float("inf"), 1e-42]),
    "cube": torch.randn(2, 3, 4),
    "transposed": torch.arange(6.0).view(2, 3).t(),
}


def test_round_trip_keeps_every_bit() -> None:
    package = pickle.loads(pickle.dumps(pack_weights(TENSORS, policy_version=7)))
    back = unpack_weights(package)
    assert package.policy_version == 7
    assert list(back) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    assert torch.signbit(back["fp32"][1])


def test_package_digest_is_that_of_the_tensors() -> None:
    expected = weights_digest({name: tensor_digest(tensor) for name, tensor in TENSORS.items()})
    assert pack_weights(TENSORS, 0).digest == pack_weights(TENSORS, 1).digest == expected


def _damaged(name: str, **changes: object) -> WeightPackage:
    package = pack_weights(TENSORS, policy_version=7)
    return replace(package, tensors={**package.tensors, name: replace(package.tensors[name], **changes)})  # type: ignore[arg-type]


def test_one_flipped_bit_is_found_and_its_tensor_named() -> None:
    content = pack_weights(TENSORS, 7).tensors["bf16"].content.copy()
    content[-1] ^= 1
    with pytest.raises(ValueError, match=r"^weights of version 7 arrived damaged: bf16$"):
        unpack_weights(_damaged("bf16", content=content))


def test_another_shape_of_the_same_bytes_is_found() -> None:
    with pytest.raises(ValueError, match=r"arrived damaged: cube$"):
        unpack_weights(_damaged("cube", shape=(4, 3, 2)))


def test_what_arrives_is_the_receivers_own() -> None:
    """Ray hands out read-only memory that all engines of a node share."""
    package = pack_weights(TENSORS, 0)
    for packed in package.tensors.values():
        packed.content.flags.writeable = False
    unpack_weights(package)["cube"].zero_()
    assert torch.equal(unpack_weights(package)["cube"], TENSORS["cube"])
