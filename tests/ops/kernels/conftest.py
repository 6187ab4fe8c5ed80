"""Every test in this folder takes the Triton path: on a GPU if there is one, else in the repaired interpreter."""

from collections.abc import Iterator

import pytest
import torch

from ops.dispatch import Path, force

# The interpreter's own tests; on a GPU there is none.
collect_ignore = ["test_interpreter.py"] if torch.cuda.is_available() else []


@pytest.fixture(autouse=True)
def _triton_path() -> Iterator[None]:
    with force(Path.TRITON):
        yield
