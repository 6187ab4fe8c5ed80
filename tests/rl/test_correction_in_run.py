"""Corrections and routing replay from the recipe to the metrics of a run."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from reward.result import Reason
from rl.monitor import read_metrics
from rl.rollouts import routing_metrics
from rl.train import resolve, run_training
from tests.rl.tiny import LocalSystem, make_prompt, make_scored, tiny_recipe

FAST = ("ops.fast=[lightning_attention]", "loop.on_mismatch=warn")


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        ((), "none"),
        (FAST, "token_tis"),
        (("rollout.engine=vllm", "loop.on_mismatch=warn"), "token_tis"),
        (("loop.max_staleness=1",), "token_tis"),
        ((*FAST, "trainer.correction.method=none"), "none"),
        (("trainer.correction.method=icepop",), "icepop"),
    ],
)
def test_the_resolved_recipe_says_what_auto_means(tmp_path: Path, overrides: tuple[str, ...], method: str) -> None:
    recipe, _ = resolve(tiny_recipe(tmp_path, *overrides))
    assert recipe.trainer.correction.method == method
    assert resolve(recipe)[0] == recipe


def test_a_recipe_that_would_weigh_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would count twice"):
        tiny_recipe(tmp_path, "trainer.correction.method=icepop", "trainer.old_log_probs=rollout")
    with pytest.raises(
        ValueError, match=r"unknown key 'trainer\.correction\.hihg': did you mean 'trainer\.correction\.high'"
    ):
        tiny_recipe(tmp_path, "trainer.correction.hihg=2")


@pytest.mark.usefixtures("local")
def test_an_unaligned_run_corrects_and_counts(tmp_path: Path) -> None:
    run_training(
        tiny_recipe(tmp_path, *FAST, "loop.steps=1", "warm_start.steps=5", "evaluation.samples=1"),
        tmp_path / "run",
        False,
        Console(quiet=True),
    )
    (record,) = read_metrics(tmp_path / "run")
    assert record["correction/weight_mean"] == pytest.approx(1.0, abs=1e-3)
    assert record["correction/sequences_vetoed"] == 0
    assert record["policy/ratio_max"] == 1.0


def test_replay_in_an_aligned_run_moves_no_bit_and_agrees(local: list[LocalSystem], tmp_path: Path) -> None:
    digests = []
    for replay in ("none", "experts", "weights"):
        recipe = tiny_recipe(tmp_path, f"rollout.routing_replay={replay}", "loop.steps=2")
        digests.append(run_training(recipe, tmp_path / replay, False, Console(quiet=True))["weights_digest"])
    assert len(set(digests)) == 1
    for replay in ("experts", "weights"):
        records = read_metrics(tmp_path / replay)
        assert [record["mismatch/expert_agreement/layer_0"] for record in records] == [1.0, 1.0]
    assert "mismatch/expert_agreement/layer_0" not in read_metrics(tmp_path / "none")[0]


def test_agreement_leaves_out_what_nobody_recorded_and_a_missing_record_is_an_error() -> None:
    """Two prompt tokens and two of the completion, of which three were fed; the engine recorded two of the three."""
    scored = make_scored(make_prompt(0), 0, (7, 8), Reason.OK, 1.0)
    engine = np.array([[[-1, -1]], [[0, 2]], [[1, 2]]], np.int16)
    trainer = np.array([[[0, 1]], [[0, 2]], [[1, 3]]], np.int16)
    with_record = make_scored(make_prompt(0), 0, (7, 8), Reason.OK, 1.0)
    object.__setattr__(with_record.completion, "routed_experts", engine)
    assert routing_metrics([with_record], [trainer], "experts") == {"mismatch/expert_agreement/layer_0": 0.5}
    assert routing_metrics([scored], [None], "none") == {}
    with pytest.raises(ValueError, match="1 of 1 completions came without the experts of their tokens"):
        routing_metrics([scored], [None], "experts")
    with pytest.raises(ValueError, match=r"weights: 1 of 1 completions .* set rollout\.routing_replay=none"):
        routing_metrics([with_record], [trainer], "weights")
