"""The run folder: what it refuses, and one process at a time."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from rl.run_folder import RunFolder, newest_run_dir


def test_create_makes_the_folder_and_open_wants_a_run(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "one")
    assert [path.name for path in folder.path.iterdir()] == ["checkpoints"]
    with pytest.raises(ValueError, match=r"one holds no run \(no recipe\.yaml\)"):
        RunFolder.open(folder.path)
    folder.recipe.write_text("name: one\n")
    assert RunFolder.open(folder.path).path == folder.path


@pytest.mark.parametrize("trace", ["recipe.yaml", "checkpoints/step_000003/state.json"])
def test_a_folder_that_holds_a_run_is_never_started_anew(tmp_path: Path, trace: str) -> None:
    (tmp_path / trace).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / trace).touch()
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume, or give another --run-dir"):
        RunFolder.create(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to the run folder .*file/run: Not a directory; give another"):
        RunFolder.create(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="cannot write to the run folder /proc/lockstep"):
        RunFolder.create(Path("/proc/lockstep"))


def test_a_full_disk_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3 * 256, f_frsize=4096))
    with pytest.raises(ValueError, match=r"has 3 MB free, a run needs 200; free some or give another --run-dir"):
        RunFolder.create(tmp_path / "run")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    with folder.locked(), pytest.raises(ValueError, match="another process is training in"):
        RunFolder(tmp_path).locked().__enter__()
    folder.locked().__enter__()


def test_json_is_written_where_it_belongs(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    folder.write_json(folder.evaluation(7), {"avg@8": 0.5})
    assert json.loads((tmp_path / "evaluation" / "step_000007.json").read_text()) == {"avg@8": 0.5}
    assert folder.rollouts(7) == tmp_path / "rollouts" / "step_000007.jsonl"


def test_newest_run_is_that_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no run named tiny under runs/ to resume"):
        newest_run_dir("tiny")
    for name in ("tiny-20260101-000000", "tiny-20260102-000000", "tiny-2-20270101-000000", "tiny-20280101-000000"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.yaml").touch()
    (tmp_path / "runs" / "tiny-20280101-000000" / "recipe.yaml").unlink()
    assert newest_run_dir("tiny") == Path("runs/tiny-20260102-000000")
