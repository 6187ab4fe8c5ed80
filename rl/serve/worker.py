"""The engine in a thread of its own, between requests that come and clients that read."""

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from rl.serve.errors import RequestError
from rollout.engine import Engine
from rollout.request import Completion, Request

RETRY_SECONDS = 1
ACCEPTED = None  # what a reader gets first

Item = Completion | Exception | None


@dataclass
class _Reader:
    """Who waits for a request. known: tokens of each sample that were handed on."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Item]
    streams: bool
    known: list[int]

    def put(self, item: Item) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    async def get(self) -> Completion | None:
        item = await self.queue.get()
        if isinstance(item, Exception):
            raise item
        return item


class EngineThread:
    """Only its thread touches the engine; what others want of it waits for the end of a step.

    max_open: requests that may be unanswered at once; a further one is told to come back.
    """

    def __init__(self, engine: Engine, max_open: int) -> None:
        self.engine, self.max_open = engine, max_open
        self._readers: dict[int, _Reader] = {}
        self._wishes: deque[Callable[[], object]] = deque()
        self._ids = itertools.count()
        self._changed = threading.Condition()
        self._stopped: RequestError | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        return len(self._readers)

    async def open(self, request: Request, streams: bool) -> AsyncIterator[Completion]:
        """The request's samples: parts with finish_reason "running" where it streams, and each whole when it ends.

        Leaving the iteration early ends the request. Raises RequestError at once when the request could never run or
        too many are open, and in the iteration when the engine fails.
        """
        if len(self._readers) >= self.max_open:
            message = f"{self.max_open} requests are open, as many as this server takes; try again"
            raise RequestError(429, message, code="busy", retry_after=RETRY_SECONDS)
        request = replace(request, request_id=next(self._ids))
        reader = _Reader(asyncio.get_running_loop(), asyncio.Queue(), streams, [0] * request.num_samples)
        self._readers[request.request_id] = reader
        try:
            self._wish(lambda: self._submit(request, reader))
            await reader.get()
        except BaseException:
            self._close(request.request_id)
            raise
        return self._read(request, reader)

    async def _read(self, request: Request, reader: _Reader) -> AsyncIterator[Completion]:
        left = request.num_samples
        try:
            while left:
                completion = await reader.get()
                assert completion is not None
                left -= completion.finish_reason != "running"
                yield completion
        finally:
            self._close(request.request_id)

    def stop(self) -> None:
        """Ends every request with an error, and the thread."""
        self._wish(self._stop)
        self._thread.join()

    def _close(self, request_id: int) -> None:
        self._readers.pop(request_id, None)
        if self._stopped is None:
            self._wish(lambda: self.engine.abort(request_id))

    def _wish(self, wish: Callable[[], object]) -> None:
        with self._changed:
            if self._stopped is not None:
                raise self._stopped
            self._wishes.append(wish)
            self._changed.notify()

    # What follows runs in the engine's thread.

    def _work(self) -> None:
        try:
            while self._stopped is None:
                with self._changed:
                    self._changed.wait_for(lambda: bool(self._wishes) or self.engine.has_work)
                    wishes, self._wishes = self._wishes, deque()
                for wish in wishes:
                    wish()
                self._hand_on(self.engine.step())
        except Exception as error:
            self._fail(RequestError(500, f"the engine failed: {type(error).__name__}: {error}"))
            raise

    def _submit(self, request: Request, reader: _Reader) -> None:
        try:
            self.engine.submit(request)
        except ValueError as error:
            reader.put(RequestError(400, str(error)))
        else:
            reader.put(ACCEPTED)

    def _hand_on(self, ended: list[Completion]) -> None:
        readers = self._readers.copy()
        for completion in ended:
            if reader := readers.get(completion.request_id):
                reader.put(completion)
        for request_id, reader in readers.items():
            if reader.streams:
                for part in self.engine.peek(request_id, reader.known):
                    reader.known[part.sample] += len(part.token_ids)
                    reader.put(part)

    def _stop(self) -> None:
        self._fail(RequestError(503, "the server is shutting down"))

    def _fail(self, error: RequestError) -> None:
        with self._changed:
            self._stopped = error
        for reader in self._readers.copy().values():
            reader.put(error)
