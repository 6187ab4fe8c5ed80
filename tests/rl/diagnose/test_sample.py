"""A saved mismatch reads back as it was, or is refused with a reason."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rl.diagnose.capture import MAX_SAMPLES, capture_mismatch
from rl.diagnose.evidence import gap, is_explained
from rl.diagnose.sample import first_sample, load_sample, sample_folder, save_sample
from rl.diagnose.traces import first_difference
from rl.run_folder import RunFolder
from tests.rl.diagnose import faults
from tests.rl.diagnose.rig import Rig, opened, run_step, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with opened(folder) as rig:
        faults.transposed_expert(rig)
        return save(rig, folder)


def test_a_sample_reads_back_as_it_was(saved: Path, tmp_path: Path) -> None:
    sample = load_sample(saved)
    save_sample(tmp_path / "again", sample, lambda path: path.mkdir())
    again = load_sample(tmp_path / "again")
    for mine, theirs in zip(sample.sequences, again.sequences, strict=True):
        for name in ("prompt_ids", "completion_ids", "rollout_log_probs", "log_probs", "response_mask"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))
            assert getattr(mine, name).dtype == getattr(theirs, name).dtype
        assert (mine.row, mine.prompt_text) == (theirs.row, theirs.prompt_text)
    assert (again.recipe, again.engine, again.traced_length) == (sample.recipe, sample.engine, sample.traced_length)
    assert again.trainer_digests == sample.trainer_digests and again.older_digests == sample.older_digests
    assert sample.engine_trace is not None and again.engine_trace is not None
    assert list(again.engine_trace.outputs) == list(sample.engine_trace.outputs)
    assert first_difference(again.engine_trace, sample.engine_trace) is None


def test_only_tensors_that_differ_are_saved_of_the_engine(saved: Path) -> None:
    sample = load_sample(saved)
    assert list(sample.engine_tensors) == ["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert sample.engine_tensors[next(iter(sample.engine_tensors))].dtype == torch.float32
    assert sorted(path.name for path in saved.iterdir()) == [
        "engine_trace.safetensors",
        "engine_weights.safetensors",
        "policy",
        "sample.json",
        "sequences.safetensors",
        "trainer_trace.safetensors",
    ]


def test_the_trace_is_of_the_shortest_beginning_that_differs(saved: Path) -> None:
    sample = load_sample(saved)
    firsts = [int(each.unequal.argmax()) for each in sample.sequences if each.unequal.any()]
    traced = sample.sequences[sample.traced]
    assert sample.traced_length == len(traced.prompt_ids) + min(firsts) + 1


def test_a_run_saves_few_mismatches(tmp_path: Path) -> None:
    with opened(tmp_path) as rig:
        compared, folder = run_step(rig, 1), RunFolder(tmp_path / "run")
        for step in range(1, MAX_SAMPLES + 1):
            sample_folder(folder.path, step).mkdir(parents=True)
        assert capture_mismatch(rig, folder, rig.recipe, MAX_SAMPLES + 1, *compared) is None
        sample_folder(folder.path, 1).rmdir()
        assert capture_mismatch(rig, folder, rig.recipe, 1, *compared) == sample_folder(folder.path, 1)


def test_nothing_is_left_of_a_sample_that_could_not_be_written(saved: Path, tmp_path: Path) -> None:
    def full_disk(path: Path) -> None:
        path.mkdir()
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_sample(tmp_path / "mismatch" / "step-000001", load_sample(saved), full_disk)
    assert list((tmp_path / "mismatch").iterdir()) == []


def test_what_is_no_sample_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no saved mismatch \(no sample\.json\); give one of RUN/mismatch"):
        load_sample(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    (copy / "sequences.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="the saved mismatch is damaged: SafetensorError"):
        load_sample(copy)
    facts = json.loads((saved / "sample.json").read_text())
    (copy / "sample.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(ValueError, match="format 99, but 1 is read"):
        load_sample(copy)
    del facts["traced"]
    (copy / "sample.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="damaged"):
        load_sample(copy)


def test_a_run_without_mismatch_has_nothing_to_diagnose(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        first_sample(tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(ValueError, match="has saved no mismatch"):
        first_sample(tmp_path)


def test_the_trainer_and_its_optimizer_are_left_as_they_were(tmp_path: Path) -> None:
    """A mismatch that only warns must not change what the step then does."""
    digests = []
    for capture in (False, True):
        with opened(tmp_path / str(capture)) as rig:
            compared = run_step(rig, 1)
            if capture:
                capture_mismatch(rig, RunFolder(tmp_path / str(capture) / "run"), rig.recipe, 1, *compared)
            rig.apply()
            digests.append(rig.sync_weights())
            assert _no_patches(rig)
    assert digests[0] == digests[1]


def _no_patches(rig: Rig) -> bool:
    return not any(module._forward_hooks for module in rig.trained.modules())


def test_a_gap_is_the_largest_and_nan_is_infinite() -> None:
    a, b = np.array([1.0, 2.0], dtype=np.float32), np.array([1.5, 2.25], dtype=np.float32)
    assert gap([a, a], [a, b]) == 0.5
    assert gap([a], [np.array([np.nan, 2.0], dtype=np.float32)]) == np.inf
    assert gap([], []) == 0.0


def test_a_hundredth_is_explained_and_what_is_not_finite_never() -> None:
    assert is_explained(1.0, 0.01) and is_explained(1e-7, 0.0)
    assert not is_explained(1.0, 0.0101) and not is_explained(0.0, 0.0) and not is_explained(np.inf, 1.0)
    assert not is_explained(1.0, np.nan)
