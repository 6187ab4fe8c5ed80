"""Freed memory is handed out again without the system: counted in page faults, in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
import ops
if sys.argv[1] == "kept":
    ops.keep_freed_memory()
def faults():
    for _ in range(8):
        blocks = [torch.empty(2**22).fill_(1.0) for _ in range(4)]  # 16 MiB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults()
before = faults()
print(faults() - before)
"""


def _faults(setting: str) -> int:
    """glibc's threshold is held where every block goes back, which else depends on what was freed before."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", FAULTS, setting]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
def test_blocks_come_back_without_page_faults() -> None:
    kept, stock = _faults("kept"), _faults("stock")
    assert kept < 100 < stock, "a block has 4,096 pages"
