"""The child process of `reward.pool`: verifies one symbolic answer at a time. Linux only (/proc, RLIMIT_AS).

Run as `python -m reward.worker <fd> <timeout_seconds> <memory_mb>`. Over the pipe `fd` it sends an empty message
once sympy is imported, then answers each JSON `[extracted, gold]` with `[reason, exhausted]`, until the parent closes
the pipe. An exhausted worker is at its memory limit and must be replaced.
Nothing it sends is unpickled, as it handles text that a policy wrote.
"""

import json
import logging
import math
import os
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from reward.result import CORRECT, Reason
from reward.verify import verify_symbolic

MIB = 1 << 20
# math-verify swallows MemoryError and calls the answer wrong; above this share of the limit a "wrong" proves nothing.
MEMORY_TRUST = 0.75


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    timeout_seconds, memory_bytes = float(sys.argv[2]), int(sys.argv[3]) * MIB
    _warm_up()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send_bytes(b"")
    while True:
        try:
            extracted, gold = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):  # the parent closed the pipe, or died
            return
        _limit_cpu(timeout_seconds)
        reason = verify_symbolic(extracted, gold).reason
        exhausted = _peak_address_space() > MEMORY_TRUST * memory_bytes
        if exhausted and reason not in CORRECT:
            reason = Reason.VERIFIER_ERROR
        connection.send_bytes(json.dumps([reason, exhausted]).encode())


def _warm_up() -> None:
    """Pay for the imports and the first parse before the clock runs."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off; ours is on
    assert verify_symbolic("\\frac{1}{2}", "0.5").reason is Reason.CORRECT_SYMBOLIC


def _limit_cpu(timeout_seconds: float) -> None:
    """Let the kernel end a busy worker whose parent died. The parent's own limit comes earlier."""
    used = os.times()
    soft = math.ceil(used.user + used.system + timeout_seconds) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _peak_address_space() -> int:
    """Bytes. Not getrusage: its maximum survives exec, so it would count the parent's memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmPeak:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
