"""Policies on disk: Hugging Face folders in and out (safetensors only), and the digests that name their content."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from policy.config import PolicyConfig
from policy.names import export_tensors, load_tensors
from policy.transformer import Policy

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and raw bytes."""
    header = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(header + content.tobytes()).hexdigest()


def weights_digest(digests: Mapping[str, str]) -> str:
    """One SHA-256 over the digests of all tensors, in order of name."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def save_policy(folder: Path, policy: Policy) -> str:
    """Writes config.json and model.safetensors; returns the weights digest. The tokenizer is for its owner to save."""
    tensors = export_tensors(policy)
    save_config(folder, policy.config, policy.dtype)
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    return weights_digest({name: tensor_digest(tensor) for name, tensor in tensors.items()})


def save_config(folder: Path, config: PolicyConfig, dtype: torch.dtype) -> None:
    """Writes config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    name = next(name for name, value in DTYPES.items() if value == dtype)
    _write(folder / "config.json", json.dumps(config.to_hf(name), indent=2) + "\n")
    generation = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id, "do_sample": True}
    _write(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def load_policy(folder: Path, dtype: torch.dtype | None = None, chunk_size: int | None = None) -> Policy:
    """FP32 masters of the policy in a Hugging Face folder; dtype and chunk_size default to what the folder says.

    Raises ValueError naming the file when the folder is not a policy, a file is damaged, or the tensors do not fit.
    """
    config = read_config(folder, chunk_size)
    policy = Policy(config, dtype or read_dtype(folder))
    try:
        load_tensors(policy, _read_tensors(folder))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return policy


def read_config(folder: Path, chunk_size: int | None = None) -> PolicyConfig:
    """The policy config in a Hugging Face folder; chunk_size replaces the folder's own."""
    fields = _read_fields(folder)
    if chunk_size is not None:
        own = fields.get("lockstep", {})
        fields["lockstep"] = {**(own if isinstance(own, dict) else {}), "chunk_size": chunk_size}
    try:
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


def _read_fields(folder: Path) -> dict[str, object]:
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


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError("no .safetensors file here; other formats (pickled .bin, .pt) are not opened")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path.name} is damaged ({error}); restore it from its source") from None
    return tensors


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
