"""Policies on disk: Hugging Face folders in and out.

Weights are streamed in both directions, so the memory in use peaks at about one shard over the policy itself.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policy.checkpoint_fp8 import (
    FP8,
    check_quantization,
    dequantize,
    dtype_problems,
    quantization_config,
    scale_name,
    weight_shapes,
)
from policy.checkpoint_read import MANIFEST, Shards
from policy.checkpoint_write import MAX_SHARD_BYTES, write_shards, write_text
from policy.config import PolicyConfig
from policy.digest import weights_digest
from policy.names import HEAD, check_tensors, fill, named_views
from policy.transformer import Policy

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
EXPORT_DTYPES = (*DTYPES, FP8)
# What goes along with the weights, byte for byte: tokenizer, chat template, the family's code (copied, never run).
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "*.py",
    "LICENSE*",
)


def save_policy(
    folder: Path,
    policy: Policy,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    source: Path | None = None,
) -> str:
    """Writes config.json and the weights in "bfloat16", "float32" or "fp8", by default the working dtype; returns the
    weights digest.

    source: the Hugging Face folder that the policy came from, whose companions go along; without one, those are for
    their owner to save.
    """
    dtype = dtype or dtype_name(policy.dtype)
    (folder / MANIFEST).unlink(missing_ok=True)  # it speaks of the weights that were here
    views = named_views(policy)
    save_config(folder, policy.config, dtype, source, quantization_config(views) if dtype == FP8 else None)
    plain = DTYPES.get(dtype, torch.bfloat16)
    return weights_digest(write_shards(folder, views, plain, dtype == FP8, max_shard_bytes))


def save_config(
    folder: Path, config: PolicyConfig, dtype: str, source: Path | None, quantization: dict[str, Any] | None = None
) -> None:
    """Writes all but the weights: config.json, with the fields of the source that are not ours, and companions."""
    if dtype not in EXPORT_DTYPES:
        raise ValueError(f"a policy cannot be saved as {dtype!r}; choose one of {', '.join(EXPORT_DTYPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    foreign = _read_fields(source) if source else {}
    for stale in ("dtype", "quantization_config"):
        foreign.pop(stale, None)
    fields = {**foreign, **config.to_hf("bfloat16" if dtype == FP8 else dtype)}
    quantized = {"quantization_config": quantization} if quantization else {}
    write_text(folder / "config.json", json.dumps({**fields, **quantized}, indent=2) + "\n")
    generation = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id, "do_sample": True}
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    if source and source != folder:
        _copy_companions(source, folder)


def load_policy(
    folder: Path,
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    decay_layer_index: str | None = None,
    fp8_linear: bool | None = None,
) -> Policy:
    """FP32 masters of the policy in a Hugging Face folder; all but the folder defaults to what the folder says.

    BF16 and FP32 weights become masters exactly; FP8 ones are multiplied by their scales in FP32, and rounded to the
    working dtype where they are used, like any master. Raises ValueError naming the file when the folder is not a
    policy, a file is damaged, or the tensors do not fit.
    """
    config = read_config(folder, chunk_size, decay_layer_index, fp8_linear)
    policy = Policy(config, dtype or read_dtype(folder))
    try:
        _load_weights(policy, Shards(folder))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return policy


def read_config(
    folder: Path,
    chunk_size: int | None = None,
    decay_layer_index: str | None = None,
    fp8_linear: bool | None = None,
) -> PolicyConfig:
    """The policy config in a Hugging Face folder; what is given besides replaces the folder's own."""
    fields = _read_fields(folder)
    given = {"chunk_size": chunk_size, "decay_layer_index": decay_layer_index, "fp8_linear": fp8_linear}
    if replaced := {name: value for name, value in given.items() if value is not None}:
        own = fields.get("lockstep", {})
        fields["lockstep"] = {**(own if isinstance(own, dict) else {}), **replaced}
    quantization = fields.pop("quantization_config", None)
    try:
        if quantization is not None:
            check_quantization(quantization)
        return PolicyConfig.from_hf(fields)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


def read_dtype(folder: Path) -> torch.dtype:
    """The dtype a folder's config.json names, bfloat16 if none."""
    fields = _read_fields(folder)
    name = str(fields.get("torch_dtype") or fields.get("dtype") or "bfloat16")
    if name not in DTYPES:
        raise ValueError(f"{folder / 'config.json'}: torch_dtype {name!r} must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def _load_weights(policy: Policy, shards: Shards) -> None:
    problems = dtype_problems(shards.entries, named_views(policy))
    if problems:
        raise ValueError(f"tensors cannot be read: {'; '.join(problems[:10])}")
    files = {name: entry.file for name, entry in shards.entries.items()}
    check_tensors(policy, weight_shapes(shards.entries), files)
    wanted = {*named_views(policy), HEAD}
    fill(policy, _read_weights(shards, [name for name in shards.entries if name in wanted]))


def _read_weights(shards: Shards, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        tensor = shards.read(name)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = dequantize(tensor, shards.read(scale_name(name)))
        if not tensor.isfinite().all():
            file = shards.entries[name].file
            raise ValueError(f"{file}: tensor {name} holds NaN or infinity; restore the file from its source")
        yield name, tensor


def _read_fields(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a policy: it has no config.json. Give a Hugging Face folder, such as RUN/policy"
        )
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                copy = folder / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
