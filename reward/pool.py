"""Scores completions; symbolic ones in worker processes that can be killed, so no answer can stall or sink a run.

The parent needs no signal handler and no main thread, so a pool works inside a Ray actor. Workers are started with
subprocess and not multiprocessing, which would import the caller's script again in each child.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType

from reward.config import RewardConfig
from reward.extract import extract_answer
from reward.result import Reason, RewardResult
from reward.verify import verify_fast

# Importing sympy takes a quarter of a second when the machine is idle; the time limit of an answer excludes it.
STARTUP_SECONDS = 120.0


class _Worker:
    """A worker process, the pipe to it, and the index of the one item it holds. It is born importing, not idle."""

    def __init__(self, config: RewardConfig) -> None:
        self.connection, child = Pipe()
        self.process = _spawn(child, config)
        child.close()
        self.timeout_seconds = config.timeout_seconds
        self.ready = False
        self.item: int | None = None
        self.start_clock(STARTUP_SECONDS)

    @property
    def idle(self) -> bool:
        return self.ready and self.item is None

    @property
    def dead(self) -> bool:
        return self.process.poll() is not None

    @property
    def milliseconds(self) -> float:
        return (time.monotonic() - self.started) * 1000

    def start_clock(self, seconds: float) -> None:
        self.started = time.monotonic()
        self.deadline = self.started + seconds

    def submit(self, item: int, extracted: str, gold: str) -> None:
        self.item = item
        self.start_clock(self.timeout_seconds)
        with suppress(OSError):  # a worker that has just died is noticed when its answer is read
            self.connection.send_bytes(json.dumps([extracted, gold]).encode())

    def receive(self) -> bytes | None:
        """The message that is waiting; None if the worker died instead of sending one."""
        try:
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            return None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


def _spawn(child: Connection, config: RewardConfig) -> subprocess.Popen[bytes]:
    package_root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    arguments = [str(child.fileno()), str(config.timeout_seconds), str(config.memory_mb)]
    # A fixed hash seed fixes the order in which sympy walks its sets, and with it the verdicts.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "reward.worker", *arguments],
        env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        pass_fds=[child.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


class RewardPool:
    """Verifies completions against gold answers. Workers start at the first symbolic answer and stay for the next.

    Use it as a context manager or call `close`. Safe to call from any thread; symbolic calls run one after another.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def score(self, items: list[tuple[str, str]]) -> list[RewardResult]:
        """Score (completion, gold) pairs; results in the order of `items`.

        An answer that exceeds the limits costs its own item only; check `RewardResult.is_failure` before using a
        score. Raises RuntimeError if a worker cannot start.
        """
        marker = self._config.answer_marker
        fast = [verify_fast(completion, gold, marker) for completion, gold in items]
        pairs: dict[int, tuple[str, str]] = {}
        for item, (completion, gold) in enumerate(items):
            if fast[item] is None:
                extracted = extract_answer(completion, marker)
                assert extracted is not None, "verify_fast decides every completion without an answer"
                pairs[item] = extracted, gold
        symbolic = self._score_symbolic(pairs)
        return [symbolic[item] if result is None else result for item, result in enumerate(fast)]

    def close(self) -> None:
        """Kill the workers. A later `score` starts new ones."""
        with self._lock:
            while self._workers:
                self._workers.pop().kill()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _score_symbolic(self, pairs: dict[int, tuple[str, str]]) -> dict[int, RewardResult]:
        with self._lock:
            queue, results = deque(pairs), dict[int, RewardResult]()
            try:
                while len(results) < len(pairs):
                    self._staff(len(pairs) - len(results))
                    self._hand_out(queue, pairs)
                    for worker, reason in self._collect():
                        assert worker.item is not None
                        results[worker.item] = RewardResult.of(reason, pairs[worker.item][0], worker.milliseconds)
                        worker.item = None
            finally:  # an interrupted call must not leave answers for the next one to read
                self._discard([worker for worker in self._workers if worker.item is not None])
            return results

    def _staff(self, open_items: int) -> None:
        self._discard([worker for worker in self._workers if worker.idle and worker.dead])
        while len(self._workers) < min(self._config.workers, open_items):
            self._workers.append(_Worker(self._config))

    def _hand_out(self, queue: deque[int], pairs: dict[int, tuple[str, str]]) -> None:
        for worker in self._workers:
            if queue and worker.idle:
                item = queue.popleft()
                worker.submit(item, *pairs[item])

    def _collect(self) -> list[tuple[_Worker, Reason]]:
        """Wait for a message or a deadline; return the workers whose item is decided. Those that failed are gone."""
        waiting = {worker.connection: worker for worker in self._workers if not worker.idle}
        patience = min(worker.deadline for worker in waiting.values()) - time.monotonic()
        spoken = wait(list(waiting), max(patience, 0.0))
        decided = []
        for connection, worker in waiting.items():
            reason = self._hear(worker) if connection in spoken else self._check_deadline(worker)
            if reason is not None:
                decided.append((worker, reason))
        return decided

    def _hear(self, worker: _Worker) -> Reason | None:
        message = worker.receive()
        if message is None:
            self._require_started(worker)
            self._discard([worker])
            return Reason.WORKER_DIED
        if not worker.ready:
            worker.ready = True
            return None
        reason, exhausted = json.loads(message)
        if exhausted:
            self._discard([worker])
        return Reason(reason)

    def _check_deadline(self, worker: _Worker) -> Reason | None:
        if time.monotonic() < worker.deadline:
            return None
        self._require_started(worker)
        self._discard([worker])
        return Reason.TIMEOUT

    def _require_started(self, worker: _Worker) -> None:
        if not worker.ready:
            self._discard([worker])
            raise RuntimeError(
                f"a reward worker did not start (exit status {worker.process.returncode}); it must import math_verify "
                f"within {STARTUP_SECONDS:.0f} s: see its traceback on stderr, or run `python -m reward.worker`"
            )

    def _discard(self, workers: list[_Worker]) -> None:
        for worker in workers:
            self._workers.remove(worker)
            worker.kill()
