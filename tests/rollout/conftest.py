"""Decode steps are recorded as soon as they can be: the samples here are too short to wait until it pays."""

import pytest

from rollout import decode_graph


@pytest.fixture(autouse=True)
def _recorded_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "PLAIN_STEPS", 1)
