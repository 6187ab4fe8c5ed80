"""What an unfinished evaluation already has, on disk: a killed one goes on where it stopped.

Beside `result.json`, `result.partial.jsonl` gets a line for each problem that is finished, after a first line that
says which evaluation this is. When all are there it becomes `result.completions.jsonl`, in the order of the problems.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rl.eval_problem import ProblemResult


def completions_path(json_file: Path) -> Path:
    return json_file.with_suffix(".completions.jsonl")


class Journal:
    """Open it with `open_journal`. `problems` holds the finished ones by index, without the texts of completions."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        self.problems: dict[int, ProblemResult] = {}
        self._places: dict[int, int] = {}  # where the line of a problem begins

    def append(self, problem: ProblemResult) -> None:
        """The problem is safe on disk when this returns."""
        self._remember(problem, self._file.tell())
        self._write(problem.to_json())

    def finish(self, completions: Path) -> None:
        """Turns the journal into the file of all completions, ordered by problem."""
        temporary = completions.with_name(completions.name + ".tmp")
        with temporary.open("wb") as file:
            for index in sorted(self._places):
                self._file.seek(self._places[index])
                file.write(self._file.readline())
            os.fsync(file.fileno())
        os.replace(temporary, completions)
        self.path.unlink()

    def restore(self, identity: Mapping[str, Any]) -> None:
        """Reads what is there; a last line that a crash tore is cut off. A new file gets its first line."""
        self._file.seek(0)
        start = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self._read(line, start, identity)
            start += len(line)
        self._file.seek(start)
        self._file.truncate()
        if start == 0:
            self._write(identity)

    def _read(self, line: bytes, start: int, identity: Mapping[str, Any]) -> None:
        try:
            content = dict(json.loads(line))
            problem = ProblemResult.from_json(content) if start else None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is damaged at byte {start} ({error}); remove it to evaluate from the start"
            ) from error
        if problem:
            self._remember(problem, start)
        else:
            self._require_same(content, identity)

    def _require_same(self, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        changed = [
            f"{key} {found.get(key)!r} there, {identity.get(key)!r} now"
            for key in {**found, **identity}
            if found.get(key) != identity.get(key)
        ]
        if changed:
            raise ValueError(
                f"{self.path} holds the beginning of another evaluation: {'; '.join(changed)}. Remove it to evaluate "
                "from the start, repeat the command it belongs to, or write another file"
            )

    def _remember(self, problem: ProblemResult, place: int) -> None:
        self.problems[problem.index] = problem.without_texts()
        self._places[problem.index] = place

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def open_journal(json_file: Path, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal beside `json_file`, begun or continued.

    identity: what decides the completions and their verdicts, as JSON values. Raises ValueError when a journal with
    another identity is there, when it is damaged, or when another process writes it.
    """
    path = json_file.with_suffix(".partial.jsonl")
    path.touch()
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes {json_file}; wait for it or write another file") from None
        journal = Journal(path, file)
        journal.restore(identity)
        yield journal
