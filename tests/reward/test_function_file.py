"""The file of a user's function is part of what decides a run."""

from pathlib import Path

import pytest

from reward.config import RewardConfig
from reward.function_file import locate_function, pin_function

# printf 'def score(**kwargs): return 1\n' | sha256sum
DIGEST = "b3f7f10d619f1cccb2a58b3265b02180f2d0979ac37c31145d09ac92b90607ea"
TEXT = "def score(**kwargs): return 1\n"


def config(path: str, sha256: str | None = None) -> RewardConfig:
    return RewardConfig.model_validate({"components": {"function": {"path": path, "sha256": sha256}}})


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(TEXT)


def test_the_digest_is_filled_in_and_the_rest_stays() -> None:
    pinned = pin_function(config("mine.py:score"))
    assert pinned == config("mine.py:score", DIGEST)
    assert pin_function(pinned) == pinned


def test_another_file_is_refused(tmp_path: Path) -> None:
    pinned = pin_function(config("mine.py:score"))
    (tmp_path / "mine.py").write_text(TEXT.replace("1", "2"))
    with pytest.raises(ValueError, match=f"the recipe says {DIGEST}: the file was changed"):
        pin_function(pinned)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"cannot read yours\.py in {tmp_path}: No such file"):
        pin_function(config("yours.py:score"))


def test_a_process_in_another_folder_finds_it(tmp_path: Path) -> None:
    located = locate_function(config("mine.py:score", DIGEST))
    assert located == config(f"{tmp_path}/mine.py:score", DIGEST)
    assert locate_function(located) == located


def test_without_a_function_there_is_nothing_to_do() -> None:
    assert pin_function(RewardConfig()) == locate_function(RewardConfig()) == RewardConfig()
