"""Writing checkpoints: shards of a limited size, one in memory at a time, named by an index."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from policy.checkpoint import save_policy
from policy.checkpoint_write import plan_shards
from policy.names import export_tensors
from tests.policy.tiny import family_config, make_policy, shared_policy


def test_hand_worked_plan() -> None:
    sizes = {"a": 4, "b": 6, "c": 1, "huge": 25, "d": 10, "e": 0}
    assert plan_shards(sizes, 10) == [["a", "b"], ["c"], ["huge"], ["d", "e"]]
    assert plan_shards(sizes, 46) == [list(sizes)]


@given(st.lists(st.integers(0, 20)), st.integers(1, 30))
def test_every_tensor_is_in_one_shard_in_order(numbers: list[int], limit: int) -> None:
    sizes = {str(index): size for index, size in enumerate(numbers)}
    shards = plan_shards(sizes, limit)
    assert [name for shard in shards for name in shard] == list(sizes)
    assert all(sum(sizes[name] for name in shard) <= limit or len(shard) == 1 for shard in shards)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_index_says_where_every_tensor_is_and_how_large_all_are(dtype: str, tmp_path: Path) -> None:
    save_policy(tmp_path, shared_policy(torch.bfloat16), dtype, max_shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    found = {name: (file, tensor) for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    sizes = [sum(tensor.nbytes for file, tensor in found.values() if file == each) for each in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert len(sizes) > 2 and max(sizes) <= 30_000


def test_transformers_reads_the_shards(tmp_path: Path) -> None:
    policy = make_policy(family_config("qwen3"), torch.float32)
    save_policy(tmp_path, policy, max_shard_bytes=30_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    ours = export_tensors(policy)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_a_shard_is_gone_from_memory_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[weakref.ref[Tensor]] = []

    def save(tensors: dict[str, Tensor], *arguments: Any, **options: Any) -> None:
        assert all(reference() is None for reference in written)
        written.extend(map(weakref.ref, tensors.values()))
        save_file(tensors, *arguments, **options)

    monkeypatch.setattr("policy.checkpoint_write.save_file", save)
    save_policy(tmp_path, shared_policy(torch.bfloat16), max_shard_bytes=30_000)
    assert len(written) == len(load_index(tmp_path))


def load_index(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return weight_map


def test_an_interrupted_write_leaves_no_file_under_a_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("policy.checkpoint_write.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_policy(tmp_path, shared_policy(torch.bfloat16))
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.index.json"))
