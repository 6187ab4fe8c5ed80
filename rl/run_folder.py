"""The run folder: where everything about a run is written, by whom, and what a second process must not do to it."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rl.monitor import replace_text

MIN_FREE_BYTES = 200 * 2**20


class RunFolder:
    """runs/NAME-TIME: recipe.yaml, metrics.jsonl, summary.json, evaluation/, rollouts/, checkpoints/, policy/ (the
    export), base/ (config and tokenizer of the policy in training), report.html."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe, self.summary = path / "recipe.yaml", path / "summary.json"
        self.checkpoints, self.policy, self.base = path / "checkpoints", path / "policy", path / "base"

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """Raises ValueError when the folder is already a run, or cannot be written."""
        folder = cls(path)
        if folder.recipe.exists() or any(folder.checkpoints.glob("step_*")):
            raise ValueError(f"{path} already holds a run; continue it with --resume, or give another --run-dir")
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            (path / ".writable").write_text("")
            (path / ".writable").unlink()
        except OSError as error:
            raise ValueError(
                f"cannot write to the run folder {path}: {error.strerror}; give another --run-dir"
            ) from None
        folder.check_space()
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        folder = cls(path)
        if not folder.recipe.is_file():
            raise ValueError(
                f"{path} holds no run (no recipe.yaml); give the folder of a run, or start one without --resume"
            )
        return folder

    def check_space(self) -> None:
        status = os.statvfs(self.path)
        free = status.f_bavail * status.f_frsize
        if free < MIN_FREE_BYTES:
            raise ValueError(
                f"{self.path} has {free / 2**20:.0f} MB free, a run needs {MIN_FREE_BYTES / 2**20:.0f}; "
                "free some or give another --run-dir"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time; the lock ends with the process, however it ends."""
        with open(self.path / ".lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process is training in {self.path}; wait for it or give another --run-dir"
                ) from None
            yield

    def rollouts(self, step: int) -> Path:
        return self.path / "rollouts" / f"step_{step:06d}.jsonl"

    def evaluation(self, step: int) -> Path:
        return self.path / "evaluation" / f"step_{step:06d}.json"

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        path.parent.mkdir(exist_ok=True)
        replace_text(path, json.dumps(content, indent=2) + "\n")


def default_run_dir(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def newest_run_dir(name: str) -> Path:
    """The run of this name that was started last. Raises ValueError when there is none."""
    stamp = "[0-9]" * 8 + "-" + "[0-9]" * 6
    runs = sorted(path.parent for path in Path("runs").glob(f"{name}-{stamp}/recipe.yaml"))
    if not runs:
        raise ValueError(f"no run named {name} under runs/ to resume; give --run-dir, or start one without --resume")
    return runs[-1]
