"""What the kernel tests share: where they run, and how two runs are held against each other bit for bit."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

if not ON_GPU:
    from tests.ops.kernels import interpreter

ROW_COUNTS = (1, 2, 3, 7, 16, 17, 33, 64, 70)


def adversarial(order_seed: int = 1) -> AbstractContextManager[None]:
    """Off a GPU: bits follow the shape of a tile, programs run in another order. A GPU is adversary enough."""
    return nullcontext() if ON_GPU else interpreter.adversarial(order_seed)


def reachable(*tensors: Tensor) -> AbstractContextManager[None]:
    """Kernels that are launched inside find these through a table of addresses."""
    return nullcontext() if ON_GPU else interpreter.allow(*tensors)


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory full of NaN: a kernel that reads what it must not shows it."""
    return torch.full(shape, float("nan"), device=DEVICE).to(dtype)


def assert_rows_alone(
    run: Callable[..., tuple[Tensor, ...]], rows: Sequence[Tensor], counts: Sequence[int] = ROW_COUNTS
) -> None:
    """`run` on the first rows of `rows` (equal in number), for each count, must give every row the bits that it has in
    the largest batch, at the front of it and at its end."""
    total = len(rows[0])
    with adversarial(order_seed=1):
        whole = run(*rows)
    for count in counts:
        for first in {0, total - count}:
            with adversarial(order_seed=count + 2):
                part = run(*(x[first : first + count].contiguous() for x in rows))
            for expected, actual in zip(whole, part, strict=True):
                assert torch.equal(actual, expected[first : first + count]), f"{count} rows from {first} differ"
