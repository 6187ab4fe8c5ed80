"""What a benchmark is of: the shape of a policy and how this machine computes with it. Its weights do not matter."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from policy.checkpoint import read_config
from policy.config import PolicyConfig
from policy.machine import choose_device, choose_dtype
from policy.transformer import Policy
from rl.base_policy import planned_config
from rl.config import load_recipe
from trainer.config import TrainerConfig


@dataclass(frozen=True)
class Subject:
    name: str
    config: PolicyConfig
    dtype: torch.dtype
    device: torch.device
    threads: int
    token_budget: int
    memory_mb: int = 1024

    @property
    def parameters(self) -> int:
        with torch.device("meta"):
            return Policy(self.config, self.dtype).num_parameters()


def subject_of(path: Path, overrides: Sequence[str] = ()) -> Subject:
    """path: a recipe, a run folder, or the Hugging Face folder of a policy. Raises ValueError for anything else."""
    recipe_path = path / "recipe.yaml" if (path / "recipe.yaml").is_file() else path
    cores = len(os.sched_getaffinity(0))
    if path.is_dir() and recipe_path == path:
        if overrides:
            raise ValueError(f"{path} is a policy without a recipe, so {' '.join(overrides)} has nothing to replace")
        device = choose_device("auto")
        dtype, _ = choose_dtype("auto", device)
        budget = TrainerConfig.model_fields["token_budget"].default
        return Subject(path.name, read_config(path), dtype, device, cores, budget)
    recipe = load_recipe(recipe_path, overrides)
    device = choose_device(recipe.policy.device)
    dtype, _ = choose_dtype(recipe.policy.dtype, device)
    config, threads = planned_config(recipe, None), recipe.trainer.threads or cores
    return Subject(recipe.name, config, dtype, device, threads, recipe.trainer.token_budget)
