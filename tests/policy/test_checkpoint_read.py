"""Reading checkpoints: a tensor at a time, nothing but safetensors, and a reason for everything that is refused."""

import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from policy.checkpoint import load_policy, save_policy
from policy.digest import tensor_digest
from policy.names import export_tensors, name_table
from tests.policy.tiny import make_config, shared_policy

QKV = "model.layers.1.attention.query_key_value.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(tmp_path / "policy", shared_policy(torch.bfloat16))
    return tmp_path / "policy"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_policy(tmp_path / "sharded", shared_policy(torch.bfloat16), max_shard_bytes=40_000)
    return tmp_path / "sharded"


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(path) | {name: tensor for name, tensor in changes.items() if tensor is not None}
    save_file({name: t for name, t in tensors.items() if changes.get(name, t) is not None}, path)


def edit_index(folder: Path, **weight_map: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | weight_map}))


def test_shards_without_an_index_are_read_together(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    want = export_tensors(shared_policy(torch.bfloat16))
    assert all(torch.equal(tensor, want[name]) for name, tensor in export_tensors(load_policy(sharded)).items())


def test_with_an_index_other_files_are_left_alone(sharded: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(50, 32)}, sharded / "consolidated.safetensors")
    assert load_policy(sharded).lm_head.count_nonzero() > 0


def test_one_file_and_a_few_tensors_are_open_at_a_time(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    peaks = {"files": 0, "tensors": 0}

    class Counting:
        def __init__(self, path: Path, framework: str) -> None:
            assert not any(isinstance(each, Counting) for each in alive), "a file is open already"
            self.handle = safe_open(path, framework)
            peaks["files"] += 1
            alive.add(self)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.handle, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            tensor = self.handle.get_tensor(name)
            alive.add(tensor)
            peaks["tensors"] = max(peaks["tensors"], len(alive) - 1)
            return tensor

    monkeypatch.setattr("policy.checkpoint_read.safe_open", Counting)
    load_policy(sharded)
    shards = len(list(sharded.glob("*.safetensors")))
    assert shards > 3
    assert peaks["files"] == 2 * shards  # once for the header, once for the tensors
    assert 1 <= peaks["tensors"] <= 2


def test_tensors_that_do_not_fit_are_listed_together(folder: Path) -> None:
    path = folder / "model.safetensors"
    changes = {"model.norm.weight": None, "model.mtp.weight": torch.zeros(1), QKV: torch.zeros(192, 32)}
    edit_tensors(path, **changes)
    with pytest.raises(ValueError, match="do not fit the config") as error:
        load_policy(folder)
    for problem in (
        str(folder),
        "missing model.norm.weight",
        "unexpected model.mtp.weight (in model.safetensors)",
        f"{QKV} has shape [192, 32], not [128, 32] (in model.safetensors)",
    ):
        assert problem in str(error.value)


def test_the_shard_of_a_tensor_that_does_not_fit_is_named(sharded: Path) -> None:
    path = shard_of(sharded, QKV)
    edit_tensors(path, **{QKV: torch.zeros(128, 31)})
    with pytest.raises(ValueError, match=rf"has shape \[128, 31\], not \[128, 32\] \(in {path.name}\)"):
        load_policy(sharded)


def test_long_lists_are_cut(folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(50, 32)}, folder / "model.safetensors")
    absent = len(name_table(make_config())) - 1
    with pytest.raises(ValueError, match=f"and {absent - 10} more"):
        load_policy(folder)


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_truncated_weights_are_refused(kept: int, sharded: Path) -> None:
    path = shard_of(sharded, QKV)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged .*; restore it"):
        load_policy(sharded)


@pytest.mark.parametrize("byte", [3, -1])
def test_a_flipped_bit_is_found_by_the_manifest(byte: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    digests = {name: tensor_digest(tensor) for name, tensor in load_file(path).items()}
    (folder / "lockstep.json").write_text(json.dumps({"tensor_digests": digests}))
    load_policy(folder)
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors(: tensor \S+ does not have the SHA-256| is damaged)"):
        load_policy(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, sharded: Path) -> None:
    path = shard_of(sharded, QKV)
    edit_tensors(path, **{QKV: torch.full((128, 32), value).bfloat16()})
    with pytest.raises(ValueError, match=f"{path.name}: tensor {QKV} holds NaN or infinity"):
        load_policy(sharded)


def test_other_dtypes_are_refused(folder: Path) -> None:
    edit_tensors(folder / "model.safetensors", **{QKV: torch.zeros(128, 32, dtype=torch.float16)})
    with pytest.raises(ValueError, match=rf"{QKV} is F16, not BF16, F32 or F8_E4M3 \(in model\.safetensors\)"):
        load_policy(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    save_file({QKV: torch.zeros(128, 32)}, folder / "more.safetensors")
    with pytest.raises(ValueError, match=rf"{QKV} is both in model\.safetensors and in more\.safetensors"):
        load_policy(folder)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    path = shard_of(sharded, QKV)
    path.unlink()
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json names {path.name}, of which nothing is"):
        load_policy(sharded)


def test_an_index_that_is_wrong_is_refused(sharded: Path) -> None:
    other = next(path.name for path in sharded.glob("*.safetensors") if path != shard_of(sharded, QKV))
    edit_index(sharded, **{QKV: other})
    with pytest.raises(ValueError, match=f"places {QKV} in {other}, which does not hold it"):
        load_policy(sharded)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin", 1])
def test_an_index_may_not_lead_elsewhere(file: Any, sharded: Path) -> None:
    edit_index(sharded, **{QKV: file})
    with pytest.raises(ValueError, match=f"names '{file}'; only .safetensors files beside it are opened"):
        load_policy(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}'])
def test_a_damaged_index_is_refused(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        load_policy(sharded)


def test_one_file_beside_an_index_is_ambiguous(sharded: Path) -> None:
    save_file(export_tensors(shared_policy(torch.bfloat16)), sharded / "model.safetensors")
    with pytest.raises(ValueError, match="remove the one that is not meant"):
        load_policy(sharded)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_opened(name: str, folder: Path) -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb(folder / "exploded")))
    load_policy(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"no \.safetensors file here; {name} may run code when opened and never is"):
        load_policy(folder)
    assert not (folder / "exploded").exists()


def test_a_pickle_under_another_name_is_not_opened_either(folder: Path) -> None:
    bomb = pickle.dumps(Bomb(folder / "exploded"))
    pickle.loads(bomb)
    (folder / "exploded").unlink()  # so it does explode where it is opened
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_policy(folder)
    assert not (folder / "exploded").exists()
