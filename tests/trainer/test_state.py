"""Checkpoints: resuming is bitwise, nothing damaged is believed, nothing saved is lost."""

import builtins
import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import trainer.state as state_module
from trainer.state import checkpoint_path, latest_checkpoint, load_checkpoint, prune, save_checkpoint
from trainer.trainer import Trainer

# mkdir; open and fsync of two files; open and fsync of the folder; rename; open and fsync of its parent.
OPERATIONS = 10


class Killed(BaseException):
    """Stands for the end of the process: no handler of the code under test may see it as an error."""


@contextmanager
def fail_at(monkeypatch: pytest.MonkeyPatch, operation: int, error: BaseException) -> Iterator[None]:
    """Every file operation of a save counts; the one with this number raises instead."""
    left = operation

    def counted(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == -1:
                raise error
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "open", counted(builtins.open), raising=False)
        for name in ("mkdir", "open", "fsync", "rename"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield
    assert left < 0, "the save has fewer operations than the test believes"


def take_steps(trainer: Trainer, samples: list, count: int) -> None:
    for _ in range(count):
        trainer.compute(samples)
        trainer.apply()


def same_state(one: Trainer, other: Trainer) -> bool:
    tensors = other.state_tensors()
    return one.policy_version == other.policy_version and all(
        torch.equal(tensor, tensors[name]) for name, tensor in one.state_tensors().items()
    )


@pytest.fixture
def saved(make_trainer, samples, tmp_path: Path) -> tuple[Trainer, Path]:
    """A trainer after two steps, and its checkpoint."""
    trainer = make_trainer(warmup_steps=5, token_budget=14)
    take_steps(trainer, samples, 2)
    path = checkpoint_path(tmp_path, 2)
    save_checkpoint(path, trainer, {"step": 2})
    return trainer, path


def test_resuming_is_bitwise(saved, make_trainer, samples) -> None:
    trainer, path = saved
    resumed = make_trainer(warmup_steps=5, token_budget=14)
    assert load_checkpoint(path, resumed) == {"step": 2}
    assert same_state(trainer, resumed)
    for each in (trainer, resumed):
        take_steps(each, samples, 2)
    assert resumed.policy_version == 4
    assert same_state(trainer, resumed)


def test_every_tensor_of_policy_and_optimizer_is_saved(saved) -> None:
    trainer, _ = saved
    names = set(trainer.state_tensors())
    moments = {f"{kind}.{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in ("position.weight", "scale")}
    assert moments | {"policy.position.weight", "policy.scale", "policy.offset"} <= names
    assert "exp_avg.offset" not in names
    # Tied to the embedding, so saved under one of the two names.
    assert "policy.embedding.weight" in names
    assert "policy.lm_head.weight" not in names


def test_extra_comes_back_as_json_keeps_it(saved, make_trainer, tmp_path: Path) -> None:
    trainer, _ = saved
    path = checkpoint_path(tmp_path, 3)
    save_checkpoint(path, trainer, {"rate": 0.1 + 0.2, "seen": (1, 2**60), "by_step": {10: None, 9: "π"}})
    extra = load_checkpoint(path, make_trainer())
    assert extra == {"rate": 0.1 + 0.2, "seen": [1, 2**60], "by_step": {"10": None, "9": "π"}}


def test_an_existing_checkpoint_is_never_overwritten(saved) -> None:
    trainer, path = saved
    with pytest.raises(ValueError, match="step_000002 exists already"):
        save_checkpoint(path, trainer, {})


@pytest.mark.parametrize("operation", range(OPERATIONS))
def test_killed_at_any_file_operation(saved, make_trainer, samples, monkeypatch, operation: int) -> None:
    trainer, path = saved
    reference, resumed = make_trainer(), make_trainer()
    load_checkpoint(path, reference)
    take_steps(trainer, samples, 1)
    following = checkpoint_path(path.parent, 3)
    with fail_at(monkeypatch, operation, Killed()), pytest.raises(Killed):
        save_checkpoint(following, trainer, {"step": 3})

    latest = latest_checkpoint(path.parent)
    assert latest is not None
    load_checkpoint(latest, resumed)
    assert same_state(resumed, trainer if latest == following else reference)
    if latest == path:
        save_checkpoint(following, trainer, {"step": 3})
        assert load_checkpoint(following, resumed) == {"step": 3}
    assert load_checkpoint(path, resumed) == {"step": 2}


@pytest.mark.parametrize("operation", range(OPERATIONS))
def test_a_full_disk_at_any_file_operation(saved, make_trainer, monkeypatch, operation: int) -> None:
    trainer, path = saved
    full = OSError(errno.ENOSPC, "No space left on device")
    with fail_at(monkeypatch, operation, full), pytest.raises(OSError, match="No space left"):
        save_checkpoint(checkpoint_path(path.parent, 3), trainer, {})
    assert not list(path.parent.glob(".*")), "the unfinished folder still takes space"
    assert load_checkpoint(path, make_trainer()) == {"step": 2}


def test_a_write_that_stops_halfway(saved, make_trainer) -> None:
    trainer, path = saved
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(checkpoint_path(path.parent, 3), trainer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in path.parent.iterdir()] == ["step_000002"]
    assert load_checkpoint(path, make_trainer()) == {"step": 2}


def test_the_operations_of_a_save_are_all_tried(saved, monkeypatch) -> None:
    trainer, path = saved
    with pytest.raises(AssertionError, match="fewer operations"), fail_at(monkeypatch, OPERATIONS, Killed()):
        save_checkpoint(checkpoint_path(path.parent, 3), trainer, {})


@pytest.mark.parametrize("name", ["trainer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "missing"])
def test_damage_is_found_and_named(saved, make_trainer, name: str, damage: str) -> None:
    _, path = saved
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes({"truncated": content[:-7], "empty": b"", "one bit": content}[damage])
    trainer, untouched = make_trainer(), make_trainer()
    with pytest.raises(ValueError, match=rf"{name} (is|was) .*; remove the folder .*step_000002") as failure:
        load_checkpoint(path, trainer)
    assert "checkpoint before it" in str(failure.value)
    assert same_state(trainer, untouched)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("policy_version", 3, "was changed after it was written"),
        ("extra", {"step": 1}, "was changed after it was written"),
        ("policy_version", "2", "policy_version: Input should be a valid integer"),
        ("format_version", 2, "has format 2, this version reads format 1"),
    ],
)
def test_an_edited_state_is_refused(saved, make_trainer, key: str, value: object, message: str) -> None:
    _, path = saved
    file = path / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, make_trainer())


def test_a_checkpoint_of_another_policy_is_refused(saved, make_trainer) -> None:
    _, path = saved
    with pytest.raises(ValueError, match=r"of another policy: policy.scale is \(6,\) torch.float32, .* has \(8,\)"):
        load_checkpoint(path, make_trainer(dim=8))
    other = make_trainer()
    other.policy.register_buffer("router_bias", torch.zeros(2))
    with pytest.raises(ValueError, match=r"1 names differ, 'policy.router_bias' is only in this policy"):
        load_checkpoint(path, other)


def test_latest_is_by_step_and_ignores_leftovers(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for name in ["step_000009", "step_000010", "step_1000000", ".step_1000001.partial", "step_x", "notes"]:
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1000000"


def test_prune_keeps_the_newest_and_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    for name in ["step_000001", "step_000002", "step_000010", ".step_000011.partial", "notes"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    prune(tmp_path, keep=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes", "step_000002", "step_000010"]
    prune(tmp_path, keep=5)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes", "step_000002", "step_000010"]
    with pytest.raises(ValueError, match="keep is 0"):
        prune(tmp_path, keep=0)


def test_a_removal_that_stops_halfway_leaves_no_half_checkpoint(saved, make_trainer, monkeypatch) -> None:
    trainer, path = saved
    following = checkpoint_path(path.parent, 3)
    save_checkpoint(following, trainer, {})

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(state_module.shutil, "rmtree", killed)
        prune(path.parent, keep=1)
    assert not path.exists()
    assert latest_checkpoint(path.parent) == following
    prune(path.parent, keep=1)
    assert [entry.name for entry in path.parent.iterdir()] == ["step_000003"]
