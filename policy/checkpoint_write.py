"""Writing safetensors: shards of a limited size, one in memory at a time, and the index that names them."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from policy.checkpoint_fp8 import is_converted, quantize, scale_name, scale_shape
from policy.checkpoint_read import INDEX, SINGLE
from policy.digest import tensor_digest
from policy.names import export_dtype, export_tensor

MAX_SHARD_BYTES = 5 * 10**9


def write_shards(
    folder: Path, views: Mapping[str, Tensor], dtype: torch.dtype, fp8: bool, max_shard_bytes: int
) -> dict[str, str]:
    """Writes the tensors in `dtype`, with fp8 the products of attention and MLP in e4m3; returns the digest of each.

    A file appears under its name when it is whole, the index after all of them.
    """
    sizes = {name: _stored_bytes(name, view, dtype, fp8) for name, view in views.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written = _write_shard(folder / file, {name: views[name] for name in names}, dtype, fp8)
        weight_map |= dict.fromkeys(written, file)
        digests |= written
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return digests


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, a new shard where the next tensor would exceed `limit` bytes; a larger one has its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _stored_bytes(name: str, view: Tensor, dtype: torch.dtype, fp8: bool) -> int:
    if fp8 and is_converted(name):
        return view.numel() + 4 * math.prod(scale_shape(tuple(view.shape)))
    return view.numel() * export_dtype(name, dtype).itemsize


def _write_shard(path: Path, views: Mapping[str, Tensor], dtype: torch.dtype, fp8: bool) -> dict[str, str]:
    """Returns the digests of its tensors, which live no longer than this."""
    tensors: dict[str, Tensor] = {}
    for name, view in views.items():
        if fp8 and is_converted(name):
            tensors[name], tensors[scale_name(name)] = quantize(export_tensor(name, view, torch.float32))
        else:
            tensors[name] = export_tensor(name, view, dtype)
    temporary = path.with_suffix(path.suffix + ".tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)
    return {name: tensor_digest(tensor) for name, tensor in tensors.items()}
