"""The server's process. Run by path, by the interpreter that has SGLang, which need not have Lockstep.

It holds a pipe from the engine, and kills its whole process group when that is closed: however the engine ended.
"""

import os
import runpy
import signal
import sys
import threading


def _end_with_the_engine() -> None:
    sys.stdin.buffer.read()
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_engine, daemon=True).start()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
