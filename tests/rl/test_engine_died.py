"""What the system makes of an engine whose server is gone, though its actor lives: the same as of a dead actor."""

from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from rl.system import LostWorker, _outcome
from rollout.verbs import EngineDied


@pytest.mark.parametrize("cause, lost", [(EngineDied("gone"), True), (ValueError("wrong"), False)])
def test_only_a_dead_engine_is_a_lost_worker(monkeypatch: pytest.MonkeyPatch, cause: Exception, lost: bool) -> None:
    def get(reference: Any) -> None:
        raise RayTaskError("generate", "traceback", cause)

    monkeypatch.setattr(ray, "get", get)
    if lost:
        assert _outcome(None) == LostWorker("gone")
    else:
        with pytest.raises(ValueError, match="wrong"):
            _outcome(None)
