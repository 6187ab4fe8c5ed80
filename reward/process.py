"""A worker process as its parent sees it: one item at a time, lines of JSON over a socket that never blocks.

The other end runs hostile text or a user's code, so nothing it does may hold up or sink the parent: it may stop
reading, stop in the middle of a line, send what is no line at all, or die.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from reward.config import RewardConfig
from reward.protocol import MAX_REPLY_BYTES, Reply

# Importing sympy takes half a second when the machine is idle; the time limit of an item excludes it.
STARTUP_SECONDS = 120.0
# What a worker that has closed its socket gets to say why on stderr.
EXIT_SECONDS = 1.0


class Worker:
    """A process, the socket to it, and the index of the one item it holds. It is born importing, not idle.

    task: what it does with an item, `verify` or `call:FUNCTION`; see `reward.worker`.
    """

    def __init__(self, task: str, config: RewardConfig) -> None:
        self._socket, child = socket.socketpair()
        self._socket.setblocking(False)
        with child:
            self.process = _spawn(child, task, config)
        self.timeout_seconds = config.timeout_seconds
        self._unsent, self._received = b"", b""
        self.ready = False
        self.item: int | None = None
        self._start_clock(STARTUP_SECONDS)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def idle(self) -> bool:
        return self.ready and self.item is None

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    @property
    def sound(self) -> bool:
        """Whether it is alive and silent, as a worker that waits for an item must be."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @property
    def milliseconds(self) -> float:
        """Since it was handed its item."""
        return (time.monotonic() - self._started) * 1000

    def submit(self, item: int, request: bytes) -> None:
        assert self.idle, "a worker holds one item"
        self.item = item
        self._start_clock(self.timeout_seconds)
        self._unsent = request + b"\n"
        self.send()

    def send(self) -> None:
        """Send as much as the worker takes now."""
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # it has died, which is noticed when its answer is read
            self._unsent = b""

    def receive(self) -> Reply | None:
        """The reply, None while its line is incomplete. Raises EOFError if the worker died, Garbled for no reply."""
        try:
            arrived = self._socket.recv(MAX_REPLY_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise EOFError from error
        if not arrived:
            raise EOFError
        self._received += arrived
        if b"\n" in arrived or len(self._received) > MAX_REPLY_BYTES:
            line, self._received = self._received, b""
            return Reply.decode(line)
        return None

    def end(self) -> int:
        """Wait for the end of a worker that has closed its socket; returns its exit status, negative for a signal."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_SECONDS)
        return self.kill()

    def kill(self) -> int:
        """End it and whatever it started; returns its exit status, negative for a signal."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._socket.close()
        return self.process.wait()

    def _start_clock(self, seconds: float) -> None:
        self._started = time.monotonic()
        self.deadline = self._started + seconds


def _spawn(child: socket.socket, task: str, config: RewardConfig) -> subprocess.Popen[bytes]:
    package_root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    arguments = [str(child.fileno()), task, str(config.timeout_seconds), str(config.memory_mb)]
    # A fixed hash seed fixes the order in which sympy walks its sets, and with it the verdicts.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "reward.worker", *arguments],
        env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
        pass_fds=[child.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        process_group=0,
    )
