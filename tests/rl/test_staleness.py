"""Which completions of an asynchronous step are scored again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reward.result import Reason
from rl.rollouts import Scored
from rl.staleness import choose_rescored
from tests.rl.tiny import make_prompt, make_scored, tiny_recipe


def scored_with(*versions: tuple[int, ...]) -> list[Scored]:
    made = [make_scored(make_prompt(n), 0, (1,) * len(each), Reason.OK, 1.0) for n, each in enumerate(versions)]
    return [
        replace(each, completion=replace(each.completion, policy_versions=np.array(own)))
        for each, own in zip(made, versions, strict=True)
    ]


MIXED = [(3, 3), (3, 4), (4, 4), (4, 5), (5, 5)]


@pytest.mark.parametrize(("mode", "allowed"), [("reprefill", {0, 1, 2, 3, 4}), ("continue", {0, 2, 4})])
def test_caches_of_older_weights_leave_a_completion_out(tmp_path: Path, mode: str, allowed: set[int]) -> None:
    recipe = tiny_recipe(tmp_path, f"rollout.on_new_weights={mode}")
    assert set(choose_rescored(recipe, 1, scored_with(*MIXED))) == allowed


def test_the_choice_is_seeded_and_bounded(tmp_path: Path) -> None:
    recipe, scored = tiny_recipe(tmp_path, "loop.rescored_sequences=5"), scored_with(*[(1,)] * 40)
    first = choose_rescored(recipe, 1, scored)
    assert len(first) == 5 and first == sorted(set(first)) == choose_rescored(recipe, 1, scored)
    assert any(choose_rescored(recipe, step, scored) != first for step in (2, 3))


def test_nothing_to_choose_from_is_nothing(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "rollout.on_new_weights=continue")
    assert choose_rescored(recipe, 1, scored_with((1, 2))) == []
