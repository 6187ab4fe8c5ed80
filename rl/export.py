"""Exported policies: a Hugging Face folder, and a manifest that ties it to the run it came from."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policy.checkpoint import DTYPES, read_config, save_policy
from policy.checkpoint_read import MANIFEST, Shards
from policy.checkpoint_write import MAX_SHARD_BYTES
from policy.digest import weights_digest
from policy.lora import merged, save_adapter
from policy.transformer import Policy
from rl.base_policy import base_folder
from rl.config import Recipe, load_recipe, recipe_digest
from rl.data_config import PROMPT_FIELDS, DataConfig
from rl.monitor import replace_text
from rl.run_folder import RunFolder
from rl.starting_policy import starting_policy
from trainer.state import latest_checkpoint, load_checkpoint
from trainer.trainer import Trainer

_UNITS = {"": 10**3, "I": 2**10}


def finish_export(run: RunFolder, folder: Path, recipe: Recipe, step: int, dtype: str | None = None) -> str:
    """Adds the manifest to a saved policy; returns the digest of its weights, taken of what the disk holds."""
    digests = Shards(folder).digests()
    manifest = {
        "run": run.path.name,
        "step": step,
        "recipe_digest": recipe_digest(recipe.model_dump(mode="json")),
        **{name: getattr(recipe.data, name) for name in PROMPT_FIELDS},
        "answer_marker": recipe.reward.answer_marker,
        "dtype": dtype or recipe.policy.dtype,
        "weights_digest": weights_digest(digests),
        "tensor_digests": digests,
    }
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return str(manifest["weights_digest"])


def export_run(
    run_dir: Path, out: Path, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> tuple[str, int]:
    """Exports the newest checkpoint of a run, finished or not, all of it or nothing: (weights digest, step).

    dtype: "bfloat16", "float32" (the masters as they are) or "fp8"; by default the run's own.
    """
    run, recipe, checkpoint = _newest(run_dir, out)
    policy, step = restore_policy(run, recipe, checkpoint)
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_policy(partial, merged(policy), dtype, max_shard_bytes, run.base)
        digest = finish_export(run, partial, recipe, step, dtype)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return digest, step


def export_adapter(run_dir: Path, out: Path) -> int:
    """Writes what LoRA trained up to the newest checkpoint, as peft reads it, into `out`; returns the step."""
    run, recipe, checkpoint = _newest(run_dir, out)
    if recipe.lora is None:
        raise ValueError(f"{run_dir} trained every weight, so there is no adapter; leave out --adapter")
    policy, step = restore_policy(run, recipe, checkpoint)
    save_adapter(out, policy, recipe.lora, str(base_folder(recipe)))
    return step


def _newest(run_dir: Path, out: Path) -> tuple[RunFolder, Recipe, Path]:
    """The run, its recipe and its newest checkpoint. Raises ValueError where there is none, or `out` is in use."""
    run = RunFolder.open(run_dir)
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is None:
        raise ValueError(f"{run_dir} has no checkpoint yet; the first comes after loop.checkpoint_every steps")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; give a new folder in --out")
    return run, load_recipe(run.recipe), checkpoint


def restore_policy(run: RunFolder, recipe: Recipe, checkpoint: Path) -> tuple[Policy, int]:
    """The policy of a checkpoint, as it was trained, and the step it was saved after."""
    if recipe.lora:
        policy = starting_policy(base_folder(recipe), recipe)
    else:
        policy = Policy(read_config(run.base), DTYPES[recipe.policy.dtype])
        policy.initialize(0)
    state = load_checkpoint(checkpoint, Trainer(policy, recipe.trainer, recipe.rollout.temperature))
    return policy, int(state["step"])


def parse_bytes(size: str) -> int:
    """Bytes of "500MB" or "5GB" (powers of ten) or "2GiB" (powers of two)."""
    match = re.fullmatch(r"([1-9]\d*)\s*([KMGT])(I?)B", size.strip().upper())
    if not match:
        raise ValueError(f"--max-shard-size {size!r}: give a whole number with a unit, such as 500MB, 5GB or 2GiB")
    return int(match[1]) * _UNITS[match[3]] ** ("KMGT".index(match[2]) + 1)


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The manifest of an exported policy; what it would say by default for a folder from elsewhere."""
    path = folder / MANIFEST
    defaults = {**{name: getattr(DataConfig(), name) for name in PROMPT_FIELDS}, "answer_marker": "\\boxed"}
    return {**defaults, **(json.loads(path.read_text()) if path.is_file() else {})}


def prompt_config(manifest: Mapping[str, Any]) -> DataConfig:
    """A data section that makes the prompts that the policy of this manifest was trained on; all else is default."""
    return DataConfig(**{name: manifest[name] for name in PROMPT_FIELDS})


def policy_folder(path: Path) -> Path:
    """A policy folder, or the exported policy of a run folder."""
    return path / "policy" if (path / "recipe.yaml").is_file() else path
