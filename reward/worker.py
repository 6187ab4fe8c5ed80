"""The child process of `reward.pool`: does one task for one item at a time. Linux only (/proc, RLIMIT_AS).

Run as `python -m reward.worker FD TASK TIMEOUT_SECONDS MEMORY_MB`. Over the socket FD it says when it is ready, then
answers each line of JSON, an object of keyword arguments, with a line of its own, until the parent closes the socket.
Nothing that it sends is unpickled, as it handles text that a policy wrote.

TASK: `verify` compares one answer with its gold, in a process that can open, run and reach nothing more;
`call:FUNCTION` calls a user's function, which may do what it likes.
"""

import json
import logging
import math
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from reward.protocol import Reply
from reward.result import Reason

MIB = 1 << 20
# math-verify swallows MemoryError and calls the answer wrong; above this share of the limit a "wrong" proves nothing.
MEMORY_TRUST = 0.75
# One of each kind, so that what sympy imports late is there before the clock runs and the doors shut.
WARM_UP = [
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    ("(x+1)^2 \\sin^2 x", "(x^2+2x+1)(1-\\cos^2 x)"),
    ("2y = 4x", "y = 2x"),
    ("1 < x \\le 2", "(1, 2]"),
    ("\\{2, 1\\}", "1, 2"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
]

Task = Callable[..., Reply]


def main() -> None:
    fd, task_name, timeout_seconds, memory_mb = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(fd, "rb") as requests, open(os.dup(fd), "wb", buffering=0) as replies:
        try:
            task = _prepare(task_name, memory_mb * MIB, replies.fileno())
        except ValueError as error:
            replies.write(Reply(Reason.USER_ERROR, str(error)).encode())
            return
        replies.write(Reply(Reason.OK).encode())
        for request in requests:
            _limit_cpu(timeout_seconds)
            replies.write(_answer(task, json.loads(request), memory_mb).encode())


def _prepare(name: str, memory_bytes: int, reply_fd: int) -> Task:
    kind, _, function = name.partition(":")
    return _prepare_verify(memory_bytes, reply_fd) if kind == "verify" else _prepare_call(function, memory_bytes)


def _prepare_call(function: str, memory_bytes: int) -> Task:
    from reward.user_function import call_function, load_function

    _limit_memory(memory_bytes)
    return partial(call_function, load_function(function))


def _prepare_verify(memory_bytes: int, reply_fd: int) -> Task:
    from reward.guard import shut
    from reward.symbolic import verify_symbolic

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off; ours is on
    for answer, gold in WARM_UP:
        assert verify_symbolic(answer, gold) is Reason.CORRECT, answer
    status = os.open("/proc/self/status", os.O_RDONLY)
    _limit_memory(memory_bytes)
    shut(reply_fd)

    def verify(extracted: str, gold: str) -> Reply:
        reason = verify_symbolic(extracted, gold)
        worn_out = _peak_address_space(status) > MEMORY_TRUST * memory_bytes
        return Reply(Reason.OUT_OF_MEMORY if worn_out and reason is not Reason.CORRECT else reason, retire=worn_out)

    return verify


def _answer(task: Task, arguments: dict[str, Any], memory_mb: int) -> Reply:
    try:
        return task(**arguments)
    except MemoryError:
        return Reply(Reason.OUT_OF_MEMORY, f"more than {memory_mb} MiB", retire=True)


def _limit_memory(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit_cpu(timeout_seconds: float) -> None:
    """Let the kernel end a busy worker whose parent died. The parent's own limit comes earlier."""
    used = os.times()
    soft = math.ceil(used.user + used.system + timeout_seconds * (os.cpu_count() or 1)) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _peak_address_space(status: int) -> int:
    """Bytes. Not getrusage: its maximum survives exec, so it would count the parent's memory."""
    text = os.pread(status, 4096, 0).decode()
    return int(text.split("VmPeak:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
