"""Planted faults, one at a time: each is found, and named by its cause; what has no known cause is not given one."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl.diagnose.diagnosis import CHECKS, Diagnosis, diagnose
from rl.diagnose.sample import Sample, load_sample, save_sample
from tests.rl.diagnose import faults
from tests.rl.diagnose.rig import Rig, opened, save

Plant = Callable[[Rig], None]
FAULTS: list[tuple[Plant, str]] = [
    (faults.shifted_mask, "wrong response mask"),
    (faults.wrong_temperature, "wrong temperature"),
    (faults.stale_tensor, "stale tensor"),
    (faults.transposed_expert, "transposed expert"),
    (faults.bf16_state, "BF16 recurrent state"),
    (faults.bf16_head, "BF16 LM head"),
    (faults.other_eps, "other RMSNorm eps"),
    (faults.unstable_top_k, "unstable top-k"),
    (faults.other_decay, "other decay convention"),
    (faults.split_k, "split-K product"),
    (faults.wrong_template, "wrong chat template"),
    (faults.lost_snapshot, "lost prefix-cache snapshot"),
    (faults.lost_at_fork, "lost prefix-cache snapshot"),
    (faults.shifted_log_probs, "shifted log-probs"),
    (faults.top_k_renormalised, "truncated distribution"),
    (faults.template_twice, "prompt tokenised twice"),
    (faults.trainer_eps, "other RMSNorm eps"),
    (faults.wrong_record, "not reproduced"),
]


def saved_with(folder: Path, fault: Plant, *overrides: str) -> Path:
    with opened(folder, *overrides, equal_experts=fault is faults.unstable_top_k) as rig:
        fault(rig)
        return save(rig, folder)


def diagnosed(folder: Path, fault: Plant) -> Diagnosis:
    return diagnose(saved_with(folder, fault))


@pytest.mark.parametrize(("fault", "name"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_planted_fault_is_named(tmp_path: Path, fault: Plant, name: str) -> None:
    found = diagnosed(tmp_path, fault)
    assert found.mismatch > 0
    assert found.finding is not None and found.finding.name == name
    assert found.suspect == ("trainer" if fault in (faults.shifted_mask, faults.trainer_eps) else "engine")
    expected = NUMBERS.get(fault, {})
    assert {key: found.finding.numbers[key] for key in expected} == expected
    assert found.verdict.count(". ") == 1 and found.verdict.endswith(".")


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "name"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_it_is_named_in_bf16_too(tmp_path: Path, fault: Plant, name: str) -> None:
    finding = diagnose(saved_with(tmp_path, fault, "policy.dtype=bfloat16")).finding
    assert finding is not None and finding.name == name


NUMBERS: dict[Plant, dict[str, Any]] = {
    faults.shifted_mask: {"sequences": 4, "shift": -1, "log_probs_explained_by_shift": -1},
    faults.wrong_temperature: {"temperature": 0.7, "expected": 1.0, "residual": 0.0},
    faults.stale_tensor: {"tensors": 1, "first": "model.layers.2.attention.dense.weight", "residual": 0.0},
    faults.transposed_expert: {"tensors": 1, "first": "model.layers.1.mlp.experts.2.down_proj.weight", "residual": 0.0},
    faults.bf16_state: {"rounded_from": "the first decoding", "residual": 0.0},
    faults.other_eps: {"eps": 1e-5, "expected": 1e-6, "residual": 0.0},
    faults.trainer_eps: {"eps": 1e-5, "expected": 1e-6, "residual": 0.0},
    faults.other_decay: {"expected": "engine", "found": "hf", "residual": 0.0},
    faults.split_k: {"operator": "layers.2.attention.dense.linear", "side": "engine"},
    faults.unstable_top_k: {"operator": "layers.1.mlp.route", "side": "engine"},
    faults.lost_snapshot: {"state_of_token": 0},
    faults.lost_at_fork: {"state_of_token": 0},
    faults.shifted_log_probs: {"log_probs_explained_by_shift": 1},
    faults.top_k_renormalised: {"top_k": 50, "top_p": 1.0, "min_p": 0.0},
    faults.wrong_record: {"mismatch": 0.125},
}


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("operator", "uses", "place", "name"),
    [
        ("softmax_attention", 2, 1, "layers.3.attention.softmax_attention"),
        slow("lightning_attention", 2, 0, "layers.0.attention.lightning_attention"),
        slow("swiglu", 4, 0, "layers.0.mlp.swiglu"),
        slow("experts", 3, 1, "layers.2.mlp.experts"),
        ("linear", 18, 16, "layers.3.mlp.shared_experts.gate_up.linear"),
    ],
)
def test_noise_is_found_where_it_is_and_given_no_other_name(
    tmp_path: Path, operator: str, uses: int, place: int, name: str
) -> None:
    finding = diagnosed(tmp_path, faults.noise(operator, uses, place)).finding
    assert finding is not None
    assert (finding.name, finding.numbers["operator"]) == ("first different operator", name)
    assert 0 < float(finding.numbers["max_abs"]) <= 1e-3 * 1.01  # the noise's amplitude, and FP32 rounding


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved sample in which nothing differs."""
    return saved_with(tmp_path_factory.mktemp("agreeing"), lambda rig: None)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_with(tmp_path_factory.mktemp("noisy"), faults.noise("swiglu", 4, 2))


def test_agreement_is_said_to_be_one(agreeing: Path) -> None:
    found = diagnose(agreeing)
    assert (found.finding, found.mismatch, found.tokens_unequal) == (None, 0.0, 0)
    assert [outcome.result for outcome in found.outcomes] == ["passed"] * len(CHECKS)
    assert found.verdict.startswith("No difference: ")


def test_the_search_ends_with_the_first_finding(tmp_path: Path) -> None:
    found = diagnosed(tmp_path, faults.wrong_temperature)
    results = {outcome.check: outcome.result for outcome in found.outcomes}
    assert results["prompt and chat template"] == "passed" and results["temperature"] == "found"
    assert set(list(results.values())[4:]) == {"not needed"}
    assert json.loads(json.dumps(found.to_json()))["finding"]["name"] == "wrong temperature"


def changed(saved: Path, folder: Path, change: Callable[[Sample], dict[str, Any]]) -> Diagnosis:
    """Of a sample that is saved again with other contents."""
    sample = load_sample(saved)
    target = folder / "changed"
    save_sample(target, dataclasses.replace(sample, **change(sample)), partial(shutil.copytree, saved / "policy"))
    return diagnose(target)


NO_WITNESS: dict[str, Any] = {"engine": {"engine": "vllm"}, "engine_trace": None, "engine_digests": {}}


def test_an_engine_that_cannot_be_looked_into_is_judged_by_its_record(tmp_path: Path) -> None:
    finding = changed(saved_with(tmp_path, faults.other_eps), tmp_path, lambda sample: NO_WITNESS).finding
    assert finding is not None and finding.name == "other RMSNorm eps"


def test_what_foreign_kernels_do_is_left_to_them(noisy: Path, tmp_path: Path) -> None:
    finding = changed(noisy, tmp_path, lambda sample: NO_WITNESS).finding
    assert finding is not None
    assert (finding.name, finding.setting) == ("kernels of the engine", "rollout.engine = vllm")


def test_tokens_of_another_version_are_stale(noisy: Path, tmp_path: Path) -> None:
    def older(sample: Sample) -> dict[str, Any]:
        aged = [dataclasses.replace(each, policy_versions=each.policy_versions + 3) for each in sample.sequences]
        return {"sequences": aged, "policy_version": 5, "witness_version": 5}

    finding = changed(noisy, tmp_path, older).finding
    assert finding is not None and finding.name == "stale policy"
    assert finding.numbers["staleness_max"] == 2


def test_nan_is_a_difference_that_nothing_explains(agreeing: Path, tmp_path: Path) -> None:
    def holed(sample: Sample) -> dict[str, Any]:
        first, *others = sample.sequences
        log_probs = first.rollout_log_probs.copy()
        log_probs[2] = np.nan
        return {"sequences": [dataclasses.replace(first, rollout_log_probs=log_probs), *others]}

    found = changed(agreeing, tmp_path, holed)
    assert found.mismatch == np.inf and found.tokens_unequal == 1
    assert found.finding is not None and found.finding.name == "not reproduced"
