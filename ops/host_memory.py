"""Memory of a process that computes on a CPU."""

import ctypes
from functools import cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's mallopt
_LARGEST_KEPT = 2**25  # what glibc accepts
_PAD = 2**26


@cache
def keep_freed_memory() -> None:
    """Asks the C library not to give freed blocks of up to 32 MiB back to the system, which would hand them out again
    page by page: that takes longer than the operators that write them. glibc listens; others are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in ((_MMAP_THRESHOLD, _LARGEST_KEPT), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _PAD)):
            mallopt(name, value)
