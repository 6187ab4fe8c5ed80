"""The base policy: made once, kept under what it depends on, never half there."""

import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from policy.checkpoint import load_policy
from policy.tokenizer import load_tokenizer, train_tokenizer
from rl.base_policy import _publish, base_policy, base_tokenizer, cache_folder
from rl.config import Recipe
from rl.system import System
from rl.weight_sync import policy_digest
from tests.rl.tiny import LocalSystem, tiny_recipe

QUIET = Console(quiet=True)
SHORT = ("warm_start.steps=2", "warm_start.tokens_per_step=128")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("rl.base_policy.TOKENIZER_EXAMPLES", 500)


def _made(recipe: Recipe) -> Path:
    with LocalSystem(recipe, QUIET) as system:
        return base_policy(recipe, base_tokenizer(recipe), system, QUIET)


def test_second_run_takes_it_from_the_cache(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, *SHORT)
    folder = _made(recipe)
    assert folder == cache_folder(recipe) and folder.is_relative_to(tmp_path / "cache")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    # A system that was never entered has no trainer, so any work would fail.
    assert base_policy(recipe, base_tokenizer(recipe), System(recipe, QUIET), QUIET) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_made_twice_it_has_the_same_bits(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, *SHORT)
    digests = []
    for _ in range(2):
        folder = _made(recipe)
        digests.append(policy_digest(load_policy(folder)))
        assert load_tokenizer(folder).eos_token_id == load_policy(folder).config.eos_token_id
        shutil.rmtree(folder)
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "override", ["seed=1", "warm_start.slip_rate=0.25", "policy.dtype=bfloat16", "data.difficulty=2"]
)
def test_another_recipe_has_another_folder(tmp_path: Path, override: str) -> None:
    assert cache_folder(tiny_recipe(tmp_path, override)) != cache_folder(tiny_recipe(tmp_path))


@pytest.mark.parametrize("override", ["loop.steps=9", "rollout.workers=4", "trainer.learning_rate=1e-5"])
def test_what_it_does_not_depend_on_leaves_the_folder(tmp_path: Path, override: str) -> None:
    assert cache_folder(tiny_recipe(tmp_path, override)) == cache_folder(tiny_recipe(tmp_path))


def test_an_interrupted_warm_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: System, folder: Path) -> None:
        folder.mkdir(parents=True)
        raise KeyboardInterrupt

    recipe = tiny_recipe(tmp_path, *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(LocalSystem, "save_policy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _made(recipe)
    assert not cache_folder(recipe).exists()
    assert load_policy(_made(recipe)).config.hidden_size == 32


def test_of_two_that_finish_the_first_wins(tmp_path: Path) -> None:
    folder, partial = tmp_path / "base", tmp_path / "base.partial"
    for path, text in ((folder, "first"), (partial, "second")):
        path.mkdir()
        (path / "config.json").write_text(text)
    _publish(partial, folder)
    assert (folder / "config.json").read_text() == "first" and not partial.exists()


def test_a_rename_that_fails_for_another_reason_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _publish(tmp_path / "base.partial", tmp_path / "base")


def test_a_given_folder_is_used_as_it_is(tmp_path: Path) -> None:
    unset = ("policy.config={}", "policy.vocab_size=null", "warm_start=null")
    recipe = tiny_recipe(tmp_path, f"policy.path={tmp_path}", *unset)
    assert base_policy(recipe, train_tokenizer(["1"], 300), System(recipe, QUIET), QUIET) == tmp_path
    assert not os.path.exists(tmp_path / "cache")
