"""Exported policies: a Hugging Face folder, and a manifest that ties it to the run it came from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from policy.checkpoint import DTYPES, read_config, save_config, save_policy, tensor_digest, weights_digest
from policy.config import PolicyConfig
from policy.tokenizer import load_tokenizer
from policy.transformer import Policy
from rl.config import Recipe, load_recipe, recipe_digest
from rl.data_config import DataConfig
from rl.monitor import replace_text
from rl.run_folder import RunFolder
from trainer.state import latest_checkpoint, load_checkpoint
from trainer.trainer import Trainer

MANIFEST = "lockstep.json"


def save_skeleton(folder: Path, config: PolicyConfig, dtype: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Config and tokenizer without weights: with a checkpoint, all that an export needs."""
    save_config(folder, config, DTYPES[dtype])
    tokenizer.save_pretrained(folder)


def finish_export(run: RunFolder, folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, step: int) -> str:
    """Adds tokenizer and manifest to the weights in `folder`; returns their digest, taken of what the disk holds."""
    tokenizer.save_pretrained(folder)
    digests = {name: tensor_digest(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    manifest = {
        "run": run.path.name,
        "step": step,
        "recipe_digest": recipe_digest(recipe.model_dump(mode="json")),
        "prompt_template": recipe.data.prompt_template,
        "answer_marker": recipe.reward.answer_marker,
        "weights_digest": weights_digest(digests),
        "tensor_digests": digests,
    }
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return str(manifest["weights_digest"])


def export_run(run_dir: Path, out: Path) -> tuple[str, int]:
    """Exports the newest checkpoint of a run, finished or not: (weights digest, step)."""
    run = RunFolder.open(run_dir)
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is None:
        raise ValueError(f"{run_dir} has no checkpoint yet; the first comes after loop.checkpoint_every steps")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder in --out")
    recipe = load_recipe(run.recipe)
    policy = Policy(read_config(run.base), DTYPES[recipe.policy.dtype])
    policy.initialize(0)
    step = int(load_checkpoint(checkpoint, Trainer(policy, recipe.trainer, recipe.rollout.temperature))["step"])
    save_policy(out, policy)
    return finish_export(run, out, recipe, load_tokenizer(run.base), step), step


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The manifest of an exported policy; what it would say by default for a folder from elsewhere."""
    path = folder / MANIFEST
    defaults = {"prompt_template": DataConfig().prompt_template, "answer_marker": "\\boxed"}
    return {**defaults, **(json.loads(path.read_text()) if path.is_file() else {})}


def policy_folder(path: Path) -> Path:
    """A policy folder, or the exported policy of a run folder."""
    return path / "policy" if (path / "recipe.yaml").is_file() else path
