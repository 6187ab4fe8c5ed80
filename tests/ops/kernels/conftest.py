"""Every test in this folder takes the Triton path: on a GPU if there is one, else in the repaired interpreter."""

from collections.abc import Iterator

import pytest

from ops.dispatch import Path, force


@pytest.fixture(autouse=True)
def _triton_path() -> Iterator[None]:
    with force(Path.TRITON):
        yield
