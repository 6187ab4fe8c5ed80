"""Scores completions; symbolic ones in worker processes that can be killed, so no answer can stall or sink a run.

The parent needs no signal handler and no main thread, so a pool works inside a Ray actor. Workers are started with
subprocess and not multiprocessing, which would import the caller's script again in each child.

What is in flight is bounded: each worker holds one item, everything else stays in the caller's list, and a caller
waits until its own list is done.
"""

import json
import select
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from reward.config import RewardConfig
from reward.extract import extract_answer
from reward.process import STARTUP_SECONDS, Worker
from reward.protocol import Garbled, Reply
from reward.result import CallResult, Method, Reason, RewardResult
from reward.tidy import tidy
from reward.verify import verify_fast

VERIFY = "verify"


@dataclass(frozen=True)
class _Outcome:
    """What became of one item, and how long it took."""

    reply: Reply
    milliseconds: float


class RewardPool:
    """Verifies completions, and runs users' functions. Workers start at the first item that needs one and stay.

    Use it as a context manager or call `close`. Safe to call from any thread; calls that need workers run one after
    another.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._teams: dict[str, list[Worker]] = {}
        self._lock = threading.Lock()

    def score(self, items: Sequence[tuple[str, str]]) -> list[RewardResult]:
        """Score (completion, gold) pairs; results in the order of `items`.

        An answer that exceeds the limits costs its own item only; check `RewardResult.is_failure` before using a
        score. Raises RuntimeError if a worker cannot start.
        """
        marker = self._config.answer_marker
        fast = [verify_fast(completion, gold, marker) for completion, gold in items]
        open_items = [item for item, result in enumerate(fast) if result is None]
        pairs = [(_extracted(items[item][0], marker), items[item][1]) for item in open_items]
        outcomes = self._run(VERIFY, [{"extracted": extracted, "gold": gold} for extracted, gold in pairs])
        symbolic = {
            item: _result(extracted, gold, outcome)
            for item, (extracted, gold), outcome in zip(open_items, pairs, outcomes, strict=True)
        }
        return [symbolic[item] if result is None else result for item, result in enumerate(fast)]

    def call(self, function: str, items: Sequence[Mapping[str, Any]]) -> list[CallResult]:
        """Call a user's function with each item as keyword arguments; results in the order of `items`.

        function: `path/to/file.py:name` or `package.module:name`. Its workers load it once and run under the limits of
            a verification; apart from those it may do what it likes.
        items: mappings that JSON can hold.

        A call that raises, returns no finite number, exceeds the limits or dies has no value and says why.
        Raises ValueError if the function cannot be loaded, RuntimeError if a worker cannot start.
        """
        outcomes = self._run(f"call:{function}", items)
        return [
            CallResult(reply.value, reply.reason, reply.message, milliseconds)
            for reply, milliseconds in ((outcome.reply, outcome.milliseconds) for outcome in outcomes)
        ]

    def close(self) -> None:
        """Kill the workers. A later `score` or `call` starts new ones."""
        with self._lock:
            for team in self._teams.values():
                _discard(team, list(team))

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, task: str, items: Sequence[Mapping[str, Any]]) -> list[_Outcome]:
        with self._lock:
            team = self._teams.setdefault(task, [])
            queue, outcomes = deque(range(len(items))), dict[int, _Outcome]()
            try:
                while len(outcomes) < len(items):
                    self._staff(team, task, len(items) - len(outcomes))
                    _hand_out(team, queue, items)
                    outcomes |= _collect(team)
            finally:  # an interrupted call must not leave answers for the next one to read
                _discard(team, [worker for worker in team if not worker.idle])
            return [outcomes[item] for item in range(len(items))]

    def _staff(self, team: list[Worker], task: str, open_items: int) -> None:
        _discard(team, [worker for worker in team if worker.idle and not worker.sound])
        while len(team) < min(self._config.workers, open_items):
            team.append(Worker(task, self._config))


def _extracted(completion: str, marker: str) -> str:
    extracted = extract_answer(completion, marker)
    assert extracted is not None, "verify_fast decides every completion without an answer"
    return extracted


def _result(extracted: str, gold: str, outcome: _Outcome) -> RewardResult:
    reply = outcome.reply
    return RewardResult.of(reply.reason, extracted, outcome.milliseconds, tidy(gold), Method.SYMBOLIC, reply.message)


def _hand_out(team: list[Worker], queue: deque[int], items: Sequence[Mapping[str, Any]]) -> None:
    for worker in team:
        if queue and worker.idle:
            item = queue.popleft()
            worker.submit(item, json.dumps(items[item]).encode())


def _collect(team: list[Worker]) -> dict[int, _Outcome]:
    """Wait for a worker to speak or a deadline; return what is decided, by item. Workers that failed are gone."""
    busy = [worker for worker in team if not worker.idle]
    readable = _wait(busy)
    outcomes = {}
    for worker in busy:
        if worker.has_unsent:
            worker.send()
        item, outcome = worker.item, _progress(team, worker, worker.fileno() in readable)
        if outcome is not None:
            assert item is not None
            outcomes[item] = outcome
            worker.item = None
    return outcomes


def _wait(busy: Sequence[Worker]) -> set[int]:
    """The descriptors that can be read. Returns at the first deadline, and when a worker takes more of its item."""
    poll = select.poll()
    for worker in busy:
        poll.register(worker, select.POLLIN | (select.POLLOUT if worker.has_unsent else 0))
    patience = min(worker.deadline for worker in busy) - time.monotonic()
    return {fd for fd, event in poll.poll(max(patience, 0.0) * 1000) if event != select.POLLOUT}


def _progress(team: list[Worker], worker: Worker, readable: bool) -> _Outcome | None:
    """What became of the worker's item, None while that is open."""
    milliseconds = worker.milliseconds
    reply = _hear(team, worker) if readable else None
    if reply is None and time.monotonic() >= worker.deadline:
        _discard(team, [worker])
        _require_started(worker, f"nothing heard for {STARTUP_SECONDS:.0f} s")
        reply = Reply(Reason.TIMEOUT, f"no answer within {worker.timeout_seconds:g} s")
    if reply is None:
        return None
    if not worker.ready:
        _welcome(team, worker, reply)
        return None
    if reply.retire:
        _discard(team, [worker])
    return _Outcome(reply, milliseconds)


def _hear(team: list[Worker], worker: Worker) -> Reply | None:
    """The worker's reply, or one in its name if it died or sent none; None while it is incomplete."""
    try:
        return worker.receive()
    except EOFError:
        message = f"the worker died with exit status {worker.end()}"
        _discard(team, [worker])
    except Garbled as error:
        _discard(team, [worker])
        message = f"the worker sent {error}"
    _require_started(worker, message)
    return Reply(Reason.WORKER_DIED, message)


def _welcome(team: list[Worker], worker: Worker, reply: Reply) -> None:
    if reply.reason is not Reason.OK:
        _discard(team, [worker])
        raise ValueError(reply.message)
    worker.ready = True


def _require_started(worker: Worker, what_happened: str) -> None:
    if not worker.ready:
        raise RuntimeError(
            f"a reward worker did not start ({what_happened}); it must import math_verify, or the user's function, "
            f"within {STARTUP_SECONDS:.0f} s: see its traceback on stderr, or run `python -m reward.worker`"
        )


def _discard(team: list[Worker], workers: Sequence[Worker]) -> None:
    for worker in workers:
        team.remove(worker)
        worker.kill()
