"""What happened to a run besides its steps, one JSON object a line of `events.jsonl`: {"step", "kind", "text"}.

A view for people, as TensorBoard is: a file that cannot be written is said and left out.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rl.monitor import read_json_lines

logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"

Kind = Literal["alarm", "restart", "skip", "resume", "correction"]


@dataclass(frozen=True)
class Event:
    """step: the one at work when it happened, 0 before the first."""

    step: int
    kind: Kind
    text: str


class EventLog:
    """Writes the events of the run in `run_dir`, each with the step that `step` names at that moment."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / EVENTS_FILE
        self.step = 0

    def append(self, kind: Kind, text: str) -> None:
        line = json.dumps(asdict(Event(self.step, kind, text)))
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            logger.warning("%s cannot be written (%s); the run goes on without this event: %s", self._path, error, line)


def read_events(run_dir: Path) -> list[Event]:
    """In the order they happened; none where there is no such file. Raises ValueError for a line that is no event."""
    path = run_dir / EVENTS_FILE
    lines = read_json_lines(path) if path.exists() else []
    return [_event(line, f"{path}: line {number}") for number, line in enumerate(lines, start=1)]


def _event(line: dict[str, Any], where: str) -> Event:
    step, kind, text = (line.get(key) for key in ("step", "kind", "text"))
    if type(step) is not int or kind not in get_args(Kind) or not isinstance(text, str):
        raise ValueError(
            f"{where} is no event: it needs a whole number under step, a text, and a kind of "
            f"{', '.join(get_args(Kind))}; remove the line"
        )
    return Event(step, cast(Kind, kind), text)
