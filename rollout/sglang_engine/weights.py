"""New weights for a running SGLang, by a file or by a broadcast, and a look at what a CPU server then computes with."""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from policy.digest import tensor_digest, weights_digest
from rollout.sglang_engine.client import SHOWN, Client
from rollout.sglang_engine.config import SglangConfig
from rollout.sglang_engine.group import UpdateGroup

SHARED_MEMORY = Path("/dev/shm")
BUCKET_BYTES = 2**29  # the server holds so much beside its weights
VOCAB_MULTIPLE = 64  # of the rows of its embeddings and head
WIDTH_MULTIPLE = 32  # of what is between gate_proj and down_proj, on a CPU
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
PARTS = {part: (whole, parts.index(part)) for whole, parts in FUSED.items() for part in parts}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
Send = Callable[[dict[str, Tensor], int, bool], str]


def send_by_disk(client: Client, config: SglangConfig) -> Send:
    """Send: takes tensors, their version and whether caches are to be emptied; returns the digest of what was sent.
    Raises ValueError or EngineDied when the server did not take it all."""
    parent = config.weights_folder or (SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)

    def send(tensors: dict[str, Tensor], policy_version: int, flush: bool) -> str:
        folder = Path(tempfile.mkdtemp(prefix=f"lockstep-weights-{policy_version}-", dir=parent))
        try:
            digest = write_weights(folder, tensors)
            body = {"model_path": str(folder), "load_format": "safetensors", **_version(policy_version, flush)}
            client.command("/update_weights_from_disk", body)
        finally:
            shutil.rmtree(folder)
        return digest

    return send


def write_weights(folder: Path, tensors: dict[str, Tensor]) -> str:
    """Writes model.safetensors, which is there whole or not at all; returns the digest of what can be read there."""
    part, whole = folder / "part", folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, {"format": "pt"})
    part.rename(whole)
    written = load_file(whole)
    if any(not torch.equal(written[name], tensor) for name, tensor in tensors.items()):
        raise ValueError(f"{whole} holds other weights than were written; is its file system sound, and not full?")
    return weights_digest({name: tensor_digest(tensor) for name, tensor in written.items()})


def send_by_broadcast(client: Client, config: SglangConfig, cuda: bool, tensor_parallel: int) -> Send:
    """As `send_by_disk`; the group is made with the first weights."""
    device = torch.device("cuda" if cuda else "cpu")
    group: list[UpdateGroup] = []

    def send(tensors: dict[str, Tensor], policy_version: int, flush: bool) -> str:
        if not group:
            group.append(UpdateGroup(client, "nccl" if cuda else "gloo", 1 + tensor_parallel, config.answer_seconds))
        client.command("/begin_weight_update", {})
        for bucket in buckets(tensors):
            group[0].send({name: tensor.to(device) for name, tensor in bucket.items()}, _version(policy_version, flush))
        client.command("/end_weight_update", {})
        return weights_digest({name: tensor_digest(tensor) for name, tensor in tensors.items()})

    return send


def buckets(tensors: Mapping[str, Tensor], most_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
    """The tensors in order, together up to a size; a larger one alone."""
    bucket: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors.items():
        if bucket and held + tensor.nbytes > most_bytes:
            yield bucket
            bucket, held = {}, 0
        bucket[name] = tensor
        held += tensor.nbytes
    if bucket:
        yield bucket


def _version(policy_version: int, flush: bool) -> dict[str, Any]:
    return {"weight_version": str(policy_version), "flush_cache": flush}


def check_version(client: Client, policy_version: int) -> None:
    """Raises ValueError when the server counts its weights as others."""
    found = client.get("/model_info").get("weight_version")
    if found != str(policy_version):
        raise ValueError(f"SGLang has weights of version {found} after an update to version {policy_version}")


def check_weights(client: Client, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Compares what a CPU server's layers hold with what was sent. Raises ValueError with the names of those that
    differ. A GPU server hashes in a way of its own, and cannot be asked."""
    match client.post("/weights_checker", {"action": "checksum"}):
        case {"ranks": [{"checksums": dict(found)}]}:
            expected = checksums(tensors, dtype)
        case answer:
            raise ValueError(f"SGLang gave no checksums of the one rank that a CPU has: {str(answer)[:SHOWN]}")
    different = [name for name, checksum in expected.items() if found.get(name) != checksum]
    if different:
        raise ValueError(
            f"SGLang computes with other weights than it was given: {', '.join(different[:5])} ({len(different)} of "
            f"{len(expected)} tensors)"
        )


def checksums(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """By SGLang's names, of the family's tensors as its layers hold them: the first 8 bytes of SHA-256, in hex."""
    found = {}
    for name, tensor in fused({name: tensor.to(dtype) for name, tensor in tensors.items()}):
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def fused(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """q, k and v are one matrix in SGLang, gate and up another, and the experts of a layer two; some have zeros at
    their end."""
    parts: dict[str, dict[tuple[int, int], Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.removesuffix(".weight").rpartition(".")
        padded = _padded(leaf, tensor)
        if expert := EXPERT.fullmatch(name):
            layer, number, kind = expert.groups()
            whole = f"{layer}.w2_weight" if kind == "down" else f"{layer}.w13_weight"
            parts.setdefault(whole, {})[int(number), int(kind == "up")] = padded
        elif leaf in PARTS:
            whole, place = PARTS[leaf]
            parts.setdefault(f"{owner}.{whole}.weight", {})[0, place] = padded
        else:
            yield name, padded
    for whole, each in parts.items():
        yield whole, torch.cat([each[place] for place in sorted(each)])


def _padded(leaf: str, tensor: Tensor) -> Tensor:
    pad = torch.nn.functional.pad
    if leaf in ("embed_tokens", "lm_head"):
        return pad(tensor, (0, 0, 0, -len(tensor) % VOCAB_MULTIPLE))
    if leaf in ("gate_proj", "up_proj"):
        return pad(tensor, (0, 0, 0, -len(tensor) % WIDTH_MULTIPLE))
    if leaf == "down_proj":
        return pad(tensor, (0, -tensor.shape[1] % WIDTH_MULTIPLE))
    return tensor
