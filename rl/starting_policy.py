"""The policy that a recipe trains, as the trainer holds it before its first step or checkpoint."""

from pathlib import Path

from policy.checkpoint import DTYPES, load_policy
from policy.lora import add_adapters
from policy.transformer import Policy
from rl.config import Recipe


def starting_policy(folder: Path, recipe: Recipe) -> Policy:
    """The policy in a Hugging Face folder: FP32 masters, or frozen weights and adapters where the recipe has `lora`."""
    source = recipe.policy
    policy = load_policy(folder, DTYPES[source.dtype], source.chunk_size, source.decay_layer_index, source.fp8_linear)
    return add_adapters(policy, recipe.lora, recipe.seed) if recipe.lora else policy
