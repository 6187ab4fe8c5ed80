"""Checkpoints of the trainer: `step_000012/` with `trainer.safetensors` and `state.json`.

A folder is written under a temporary name, flushed to disk and renamed into place, so a folder with a checkpoint's
name is whole, whenever the process or the machine stopped. What is read back is checked against SHA-256 digests.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from trainer.trainer import Trainer

FORMAT_VERSION = 1
TENSORS = "trainer.safetensors"
STATE = "state.json"
_NAME = re.compile(r"step_(\d{6,})")
_PARTIAL = re.compile(r"\.step_\d{6,}\.partial")


class CheckpointState(BaseModel):
    """`state.json`. policy_version: optimizer steps taken, which is also the position in the learning-rate schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: int
    policy_version: int
    tensors_sha256: str
    extra: dict[str, Any]
    state_sha256: str


def checkpoint_path(checkpoints_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints_dir / f"step_{step:06d}"


def save_checkpoint(path: Path, trainer: Trainer, extra: dict[str, Any]) -> None:
    """Writes the checkpoint `path` (a `step_000012` folder), all of it or nothing.

    extra: JSON values, given back by `load_checkpoint`. Raises OSError when the disk refuses (full, not writable),
    ValueError when `path` is there already. Other checkpoints are not touched in either case.
    """
    if path.exists():
        raise ValueError(f"checkpoint {path} exists already and is never overwritten; move it away or remove it first")
    tensors = safetensors.torch.save({name: tensor.contiguous() for name, tensor in trainer.state_tensors().items()})
    state = {
        "format_version": FORMAT_VERSION,
        "policy_version": trainer.policy_version,
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        # As it will be read back (keys become strings, tuples lists), so that the digest covers just that.
        "extra": json.loads(json.dumps(extra, allow_nan=False)),
    }
    state["state_sha256"] = _state_sha256(state)
    _write_folder(path, {TENSORS: tensors, STATE: json.dumps(state, indent=2).encode()})


def load_checkpoint(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Brings `trainer` to the state saved in `path` and returns the `extra` saved with it.

    Raises ValueError, with the trainer as it was, when a file is missing, damaged or of another policy.
    """
    state = _read_state(path / STATE)
    tensors = _read_tensors(path / TENSORS, state.tensors_sha256)
    _check_fits(path / TENSORS, tensors, trainer.state_tensors())
    trainer.load_state(tensors, state.policy_version)
    return state.extra


def latest_checkpoint(checkpoints_dir: Path) -> Path | None:
    """The checkpoint of the highest step, or None. What an interrupted save left behind does not count."""
    checkpoints = _checkpoints(checkpoints_dir)
    return checkpoints[-1] if checkpoints else None


def prune(checkpoints_dir: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints, and what interrupted saves left behind."""
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one checkpoint must stay, or the run cannot be resumed")
    for leftover in [entry for entry in _entries(checkpoints_dir) if _PARTIAL.fullmatch(entry.name)]:
        shutil.rmtree(leftover)
    for checkpoint in _checkpoints(checkpoints_dir)[:-keep]:
        # Renamed first: a removal that stops halfway must not leave half a checkpoint under a checkpoint's name.
        os.rename(checkpoint, _partial(checkpoint))
        shutil.rmtree(_partial(checkpoint))


def _checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Oldest first."""
    names = ((entry, _NAME.fullmatch(entry.name)) for entry in _entries(checkpoints_dir))
    return [entry for _, entry in sorted((int(name[1]), entry) for entry, name in names if name)]


def _entries(checkpoints_dir: Path) -> list[Path]:
    return sorted(checkpoints_dir.iterdir()) if checkpoints_dir.is_dir() else []


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _write_folder(path: Path, files: dict[str, bytes]) -> None:
    partial = _partial(path)
    if partial.exists():
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        for name, content in files.items():
            _write_file(partial / name, content)
        _sync_folder(partial)
        os.rename(partial, path)
    except OSError:
        # A full disk: give back the space that the unfinished folder takes.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _state_sha256(state: dict[str, Any]) -> str:
    """Over everything but the digest itself, so that a flipped digit in a number is found too."""
    content = {key: value for key, value in state.items() if key != "state_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _unusable(path: Path, problem: str) -> ValueError:
    remedy = f"remove the folder {path.parent} and the run goes on from the checkpoint before it"
    return ValueError(f"checkpoint file {path} {problem}; {remedy}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise _unusable(path, "is missing") from error


def _read_state(path: Path) -> CheckpointState:
    try:
        content = json.loads(_read(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _unusable(path, f"is damaged: it is not JSON ({error})") from error
    try:
        state = CheckpointState.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        raise _unusable(path, f"is damaged: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    if state.format_version != FORMAT_VERSION:
        raise _unusable(path, f"has format {state.format_version}, this version reads format {FORMAT_VERSION}")
    if state.state_sha256 != _state_sha256(content):
        raise _unusable(path, "was changed after it was written (its SHA-256 differs)")
    return state


def _read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    content = _read(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise _unusable(path, f"is damaged: its {len(content)} bytes do not have the SHA-256 that {STATE} records")
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise _unusable(path, f"is not a safetensors file ({error})") from error


def _check_fits(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if odd := sorted(found.keys() ^ expected.keys()):
        where = "the checkpoint" if odd[0] in found else "this policy"
        raise _unusable(path, f"is of another policy: {len(odd)} names differ, {odd[0]!r} is only in {where}")
    for name, tensor in expected.items():
        if (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype):
            got, want = (f"{tuple(t.shape)} {t.dtype}" for t in (found[name], tensor))
            raise _unusable(path, f"is of another policy: {name} is {got}, this policy has {want}")
