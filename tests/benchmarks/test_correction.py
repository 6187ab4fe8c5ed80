"""The benchmark of corrections: its task and its measure by hand, and that only the mismatched arms differ."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import correction
from rollout.request import Completion
from trainer.batch import TrainSample


def test_the_answer_is_the_prompt_in_reverse_twice() -> None:
    prompt = np.array([1, 2, 3, 4, 5, 6, correction.ASK])
    assert correction._answer(prompt).tolist() == [6, 5, 4, 3, 2, 1] * 2
    given = np.array([6, 5, 0, 3, correction.END])
    nothing = np.zeros(5, np.float32)
    assert correction._reward(Completion(0, 0, given, nothing, given, "stop"), prompt) == 3 / 12


def test_k3_by_hand() -> None:
    sample = TrainSample(np.array([1, 2, 3]), 1, np.array([-1.0, -2.0], np.float32), 0.0)
    found = correction._k3([sample], [np.array([-1.0, -1.0], np.float32)])
    assert found == pytest.approx((np.e - 2) / 2, rel=1e-6)


def test_smoothing_looks_back_only() -> None:
    assert correction._smooth([3.0, 5.0, 1.0, 9.0], width=2).tolist() == [3.0, 4.0, 3.0, 5.0]


def test_the_aligned_arm_alone_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)  # of this whole process
    monkeypatch.setattr(correction, "arguments", lambda _: Namespace(out=tmp_path, quick=True))
    correction.main()
    arms = json.loads((tmp_path / "correction.json").read_text())["arms"]
    k3 = {name: arm["curves"][0]["k3"] for name, arm in arms.items()}
    assert k3.pop("aligned") == [0.0] * correction.QUICK.steps
    assert all(min(values) > 0 for values in k3.values())
    assert "correction/weight_ess" in arms["token_tis"]["curves"][0]
    assert (tmp_path / "correction.svg").stat().st_size > 0
