"""Weights on their way from the trainer to the engines: one package a version, with a digest for every tensor.

Tensors travel as byte arrays, so Ray's object store hands them to every engine of a node from shared memory without a
copy.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policy.digest import tensor_digest, weights_digest
from policy.names import export_tensors
from policy.transformer import Policy


@dataclass(frozen=True)
class PackedTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: str
    content: np.ndarray  # uint8


@dataclass(frozen=True)
class WeightPackage:
    policy_version: int
    tensors: dict[str, PackedTensor]

    @property
    def digest(self) -> str:
        return weights_digest({name: packed.digest for name, packed in self.tensors.items()})


def pack_weights(tensors: dict[str, Tensor], policy_version: int) -> WeightPackage:
    packed = {
        name: PackedTensor(
            tensor.dtype,
            tuple(tensor.shape),
            tensor_digest(tensor),
            tensor.contiguous().view(-1).view(torch.uint8).numpy(),
        )
        for name, tensor in tensors.items()
    }
    return WeightPackage(policy_version, packed)


def unpack_weights(package: WeightPackage) -> dict[str, Tensor]:
    """Raises ValueError naming the tensors whose content is not what the trainer sent."""
    tensors = {
        name: torch.from_numpy(packed.content.copy()).view(packed.dtype).view(packed.shape)
        for name, packed in package.tensors.items()
    }
    damaged = [name for name, tensor in tensors.items() if tensor_digest(tensor) != package.tensors[name].digest]
    if damaged:
        raise ValueError(f"weights of version {package.policy_version} arrived damaged: {', '.join(damaged[:5])}")
    return tensors


def policy_digest(policy: Policy) -> str:
    """The digest of the weights that a policy computes with, as an export of it would have."""
    return weights_digest({name: tensor_digest(tensor) for name, tensor in export_tensors(policy).items()})
