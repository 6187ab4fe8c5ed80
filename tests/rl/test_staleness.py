"""Which completions of an asynchronous step are scored again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from policy.names import export_tensors
from reward.result import Reason
from rl.actors import TrainerActor
from rl.rollouts import Scored
from rl.staleness import choose_rescored
from tests.rl.tiny import make_prompt, make_scored, tiny_recipe
from tests.rollout.tiny import make_engine, make_policy, make_request
from trainer.batch import TrainSample
from trainer.config import TrainerConfig
from trainer.trainer import Trainer


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


def test_tokens_of_every_version_have_the_engines_bits_though_routes_are_replayed() -> None:
    """What ran when the weights came was computed again, and its routes are those of the newer weights."""
    policies = [make_policy(seed=seed, stops=False) for seed in (0, 1)]
    engine = make_engine(policies[0], routing_replay="weights", max_batch=8)
    asked = make_request(0, 20, 4, max_new_tokens=12, min_new_tokens=12)
    engine.submit(asked)
    completions = [done for _ in range(5) for done in engine.step()]
    engine.load_weights(export_tensors(policies[1]), 1)
    while engine.has_work:
        completions += engine.step()
    actor = object.__new__(TrainerActor)
    actor.trainer, actor.device = Trainer(policies[1], TrainerConfig(), 1.0), torch.device("cpu")
    actor.trainer.load_state(actor.trainer.state_tensors(), policy_version=1)
    actor.versions = {0: export_tensors(policies[0])}
    samples = [
        TrainSample(
            np.concatenate([asked.prompt_ids, each.token_ids]),
            20,
            each.log_probs,
            1.0,
            each.routed_experts,
            each.routed_weights,
        )
        for each in completions
    ]
    versions = [each.policy_versions for each in completions]
    assert any(0 in each and 1 in each for each in versions)
    for found, each in zip(actor.log_probs_of_versions(samples, versions), completions, strict=True):
        assert np.array_equal(found, each.log_probs)
