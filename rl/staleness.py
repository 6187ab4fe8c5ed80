"""Asynchronous runs: what of a mismatch is numeric, found by scoring tokens again under the weights they came from."""

from collections.abc import Sequence

import numpy as np

from rl.config import Recipe
from rl.rollouts import Scored


def choose_rescored(recipe: Recipe, step: int, scored: Sequence[Scored]) -> list[int]:
    """A seeded choice of loop.rescored_sequences completions whose log-probs one version after the other can repeat.

    A completion that went on under new weights from what older ones had cached (rollout.on_new_weights = continue)
    belongs to no version as a whole, so it is left out.
    """
    whole = recipe.rollout.on_new_weights == "reprefill"
    places = [n for n, each in enumerate(scored) if whole or len(np.unique(each.completion.policy_versions)) == 1]
    generator = np.random.Generator(np.random.Philox(key=[recipe.seed, step]))
    count = min(recipe.loop.rescored_sequences, len(places))
    return sorted(generator.choice(places, size=count, replace=False).tolist()) if count else []
