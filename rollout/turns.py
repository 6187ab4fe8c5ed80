"""One verb of an engine at a time, and none waits for more than the step that is running."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._waiting = 0

    @contextmanager
    def verb(self) -> Iterator[None]:
        """Goes before the next step."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._taken)
            self._waiting -= 1
            self._taken = True
        with self._giving_back():
            yield

    @contextmanager
    def step(self) -> Iterator[None]:
        """Goes after every verb that waits: a loop of steps would take the lock again before any of them wakes up."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken and not self._waiting)
            self._taken = True
        with self._giving_back():
            yield

    def wait_for_a_verb(self) -> None:
        """Returns when another verb has had its turn, or after a second."""
        with self._changed:
            self._changed.wait(timeout=1.0)

    @contextmanager
    def _giving_back(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
