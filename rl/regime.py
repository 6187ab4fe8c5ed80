"""Which agreement between trainer and sampler a recipe promises: in every bit, or not, and why not."""

from rl.config import Recipe


def unaligned_causes(recipe: Recipe) -> list[str]:
    """What gives up equality in every bit of log-probs under one version of the weights; empty in an aligned run."""
    fast, engine = recipe.ops.fast, recipe.rollout.engine
    causes = [f"fast {', '.join(fast)}"] if fast else []
    return causes + ([] if recipe.rollout.is_aligned else [f"kernels of {engine}"])


def regime(recipe: Recipe) -> str:
    causes, staleness = unaligned_causes(recipe), recipe.loop.max_staleness
    agreement = f"not aligned: {', '.join(causes)}" if causes else "aligned"
    return f"{agreement}; asynchronous, at most {staleness} versions stale" if staleness else agreement
