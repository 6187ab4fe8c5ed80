"""What a probe of `lockstep doctor` is, and the search for a row whose bits depend on its batch (design A1).

A probe is an operator on fixed inputs, as one or more paths that must agree: a path takes a slice of the batch and
gives the output of those rows alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

RowPath = Callable[[slice], Tensor]
Probe = Callable[[torch.dtype], dict[str, RowPath]]

ROW_COUNTS = (1, 2, 3, 5, 7, 16, 17, 33)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_difference(probe: Probe, dtype: torch.dtype, thread_counts: Sequence[int]) -> tuple[int, str] | None:
    """Every path, in small batches and at every thread count, against the first path in one batch at the first count.

    Returns the thread count of the first difference and a sentence that describes it, or None.
    """
    expected: Tensor | None = None
    for threads in thread_counts:
        with torch_threads(threads), torch.no_grad():
            paths = probe(dtype)
            if expected is None:
                expected = next(iter(paths.values()))(slice(None))
            if (found := _differing_rows(paths, expected)) is not None:
                return threads, f"{found}; {threads} threads"
    return None


def _differing_rows(paths: dict[str, RowPath], expected: Tensor) -> str | None:
    total = len(expected)
    batches = [slice(0, total)]
    batches += [rows for count in ROW_COUNTS for rows in (slice(0, count), slice(total - count, total))]
    for name, path in paths.items():
        for rows in batches:
            if not torch.equal(path(rows), expected[rows]):
                place = f"rows {rows.start} to {rows.stop - 1} of {total}"
                return f"{name}, a batch of {rows.stop - rows.start} ({place}): other bits than in one batch of {total}"
    return None


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """FP32 normal numbers, the same on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
