"""Whole runs in this process on chosen problems: dynamic sampling, resumed to the same bits; mixtures; curriculum."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rl.data import write_jsonl
from rl.monitor import read_json_lines, read_metrics
from rl.problems import generate
from rl.train import plan, run_training
from tests.rl.tiny import GROUP, PROMPTS, STEPS, LocalSystem, tiny_recipe

DYNAMIC = ("loop.dynamic_sampling.max_rounds=3", "loop.rollouts_saved=4")


def _train(folder: Path, *overrides: str, resume: bool = False) -> Path:
    run_training(tiny_recipe(folder, *overrides), folder / "run", resume, Console(quiet=True))
    return folder / "run"


def _digest(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["weights_digest"])


def _asked(run: Path) -> list[list[str]]:
    """Prompts of every step, of which the run folder keeps all."""
    files = sorted((run / "rollouts").iterdir())
    return [[group["prompt_id"] for group in read_json_lines(path)] for path in files]


def _interrupted_in_step(folder: Path, step: int, *overrides: str) -> None:
    """Ctrl-C in this step, as its first completions are scored."""
    rewards = LocalSystem.rewards

    def interrupted(self: LocalSystem, items: Any) -> Any:
        if self.trainer.target.trainer.policy_version == step - 1:
            raise KeyboardInterrupt
        return rewards(self, items)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalSystem, "rewards", interrupted)
        _train(folder, *overrides)


@pytest.fixture(scope="module")
def dynamic_run(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Path:
    """The tiny recipe with dynamic sampling. To be read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base_cache))
        patch.setattr("rl.train.System", LocalSystem)
        return _train(tmp_path_factory.mktemp("dynamic"), *DYNAMIC)


def test_groups_without_signal_are_replaced_and_counted(dynamic_run: Path, finished_run: Path) -> None:
    """The plain run has such groups, so that there is something to replace."""
    assert sum(record["policy/groups_without_signal"] or 0 for record in read_metrics(finished_run)) > 0
    assert not any("sampling/rounds" in record for record in read_metrics(finished_run))
    records = read_metrics(dynamic_run)
    rounds = [int(record["sampling/rounds"] or 0) for record in records]
    assert max(rounds) > 1 and all(1 <= each <= 3 for each in rounds)
    for record, used in zip(records, rounds, strict=True):
        left_out = (record["sampling/groups_skipped"] or 0) + (record["sampling/groups_surplus"] or 0)
        assert left_out == (used - 1) * PROMPTS
        assert record["policy/groups_without_signal"] == 0 or used == 3
        assert record["mismatch/tokens_unequal"] == 0 and record["length/mean"]
    assert all(len(step) == PROMPTS for step in _asked(dynamic_run))
    state = json.loads((dynamic_run / "checkpoints" / f"step_{STEPS:06d}" / "state.json").read_text())
    assert state["extra"] == {"step": STEPS, "data_cursor": sum(rounds)}


def test_the_cursor_survives_an_interruption(
    dynamic_run: Path, finished_run: Path, local: list[LocalSystem], tmp_path: Path
) -> None:
    """Interrupted where more batches than steps have been drawn, so that the step alone would not tell the place."""
    rounds = [int(record["sampling/rounds"] or 0) for record in read_metrics(dynamic_run)]
    assert sum(rounds[:-1]) > STEPS - 1
    _interrupted_in_step(tmp_path, STEPS, *DYNAMIC)
    run = _train(tmp_path, *DYNAMIC, "rollout.workers=2", "rollout.max_batch=5", resume=True)
    assert _digest(run) == _digest(dynamic_run) != _digest(finished_run)
    assert _asked(run) == _asked(dynamic_run)


@pytest.fixture(scope="module")
def problem_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """12 problems, and 12 others with pass rates 0/11, 1/11, ... in a shuffled order."""
    folder = tmp_path_factory.mktemp("problems")
    problems = generate("train", 24, 0, 1, ["remainder"])
    write_jsonl(problems[:12], folder / "plain.jsonl")
    rated = [
        {"id": each.id, "problem": each.problem, "answer": each.answer, "pass_rate": (5 * number % 12) / 11}
        for number, each in enumerate(problems[12:])
    ]
    (folder / "rated.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rated))
    return folder / "plain.jsonl", folder / "rated.jsonl"


def test_a_mixture_is_asked_by_weight(
    problem_files: tuple[Path, Path], local: list[LocalSystem], tmp_path: Path
) -> None:
    plain, rated = problem_files
    run = _train(tmp_path, f"data.train=[{{source: {plain}, weight: 3}}, {rated}]", "loop.rollouts_saved=4")
    for record in read_metrics(run):
        assert (record["data/prompts/plain"], record["data/prompts/rated"]) == (3, 1)
    asked = Counter(prompt for step in _asked(run) for prompt in step)
    assert len(asked) == 16 and set(asked.values()) == {1}


def test_a_curriculum_asks_the_easy_ones_first(
    problem_files: tuple[Path, Path], local: list[LocalSystem], tmp_path: Path
) -> None:
    rated = problem_files[1]
    rates = {record["id"]: record["pass_rate"] for record in read_json_lines(rated)}
    run = _train(
        tmp_path,
        f"data.train={rated}",
        "data.curriculum_stages=2",
        "data.filters.pass_rate=[0.1, 0.8]",
        "loop.rollouts_saved=4",
    )
    easy, hard = ([rates[prompt] for step in half for prompt in step] for half in (_asked(run)[:2], _asked(run)[2:]))
    assert len(easy) == len(hard) == 2 * PROMPTS
    assert min(easy) > max(hard) and max(easy) <= 0.8 and min(hard) >= 0.1


def test_the_plan_says_what_is_left_out(problem_files: tuple[Path, Path], tmp_path: Path) -> None:
    rated = problem_files[1]
    lines = plan(tiny_recipe(tmp_path, f"data.train={rated}", f"data.eval={rated}", "data.filters.pass_rate=[0, 0.5]"))
    assert "data: 6 training and 8 held-out problems" in lines
    assert "6 of 12 training problems left out by data.filters.pass_rate" in lines
    assert "warning: " in lines and " training problems hold " in lines


def test_all_completions_of_a_step_count_for_the_time(dynamic_run: Path) -> None:
    """Tokens a second are of all that was sampled: at least the shortest group, one token each."""
    for record in read_metrics(dynamic_run):
        sampled = (record["rollout/tokens_per_second"] or 0) * (record["time/rollout"] or 0)
        trained = (record["length/mean"] or 0) * PROMPTS * GROUP
        extra = ((record["sampling/rounds"] or 0) - 1) * PROMPTS * GROUP
        assert sampled >= trained + extra - 0.5
