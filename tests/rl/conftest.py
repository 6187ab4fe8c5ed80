"""The running system without Ray, and a finished run that many tests look at, made once."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rl.train import run_training
from tests.rl.tiny import LocalSystem, tiny_recipe


@pytest.fixture(scope="session")
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of base policies that tests share, so that the tiny one is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, base_cache: Path) -> list[LocalSystem]:
    """Lets `lockstep train` run in this process; returns the list that the systems it opens are appended to."""
    opened: list[LocalSystem] = []

    def open_system(*arguments: Any) -> LocalSystem:
        opened.append(LocalSystem(*arguments))
        return opened[-1]

    monkeypatch.setenv("XDG_CACHE_HOME", str(base_cache))
    monkeypatch.setattr("rl.train.System", open_system)
    return opened


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Path:
    """The run folder of the tiny recipe, trained without Ray. To be read only."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base_cache))
        patch.setattr("rl.train.System", LocalSystem)
        run_training(tiny_recipe(folder), folder / "run", resume=False, console=Console(quiet=True))
    return folder / "run"
