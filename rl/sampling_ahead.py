"""Batches sampled ahead of the step that trains on them: one loop with a staleness bound, 0 being synchronous."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class SamplingAhead(Generic[Batch]):
    """Hands out the batches of steps first .. last in order.

    sample: makes the batch of a step. With max_staleness = 0 it runs when the batch is taken. Otherwise it runs in a
    thread, in order of step, and when the batch of step n is handed out those up to n + max_staleness are asked for. A
    batch is thus begun under weights at most max_staleness versions older than those that its step starts from.
    """

    def __init__(self, sample: Callable[[int], Batch], last: int, max_staleness: int) -> None:
        self._sample, self._last, self._max_staleness = sample, last, max_staleness
        self._asked: dict[int, Future[Batch]] = {}
        self._queue: SimpleQueue[tuple[int, Future[Batch]]] = SimpleQueue()
        if max_staleness:
            threading.Thread(target=self._work, name="sampling ahead", daemon=True).start()

    def take(self, step: int) -> Batch:
        """Raises what sampling the batch raised."""
        if not self._max_staleness:
            return self._sample(step)
        self._ask(step)
        batch = self._asked.pop(step).result()
        for later in range(step + 1, min(step + self._max_staleness, self._last) + 1):
            self._ask(later)
        return batch

    def _ask(self, step: int) -> None:
        if step not in self._asked:
            self._asked[step] = Future()
            self._queue.put((step, self._asked[step]))

    def _work(self) -> None:
        while True:
            step, future = self._queue.get()
            try:
                future.set_result(self._sample(step))
            except BaseException as error:  # handed to the loop, which ends the run
                future.set_exception(error)
                return
