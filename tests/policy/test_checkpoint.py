"""Policies on disk: what is written is what is read, to the bit, and what cannot be read is refused with a reason."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from policy.checkpoint import load_policy, read_config, save_policy, tensor_digest, weights_digest
from policy.names import export_tensors, load_tensors, name_table
from policy.transformer import Policy
from tests.policy.tiny import make_config, shared_policy

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(tmp_path / "policy", shared_policy(torch.bfloat16))
    return tmp_path / "policy"


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("dtype", DTYPES)
def test_export_of_import_is_the_same_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    digest = save_policy(first, shared_policy(dtype))
    loaded = load_policy(first)
    assert (loaded.config, loaded.dtype) == (shared_policy(dtype).config, dtype)
    assert save_policy(second, loaded) == digest
    names = sorted(path.name for path in first.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    for name in names:
        assert (second / name).read_bytes() == (first / name).read_bytes()


def test_foreign_tensors_survive_import_and_export() -> None:
    policy = Policy(make_config(), torch.bfloat16)
    tensors = {name: torch.randn_like(tensor) for name, tensor in export_tensors(shared_policy(torch.bfloat16)).items()}
    load_tensors(policy, tensors | {"model.layers.0.attention.slope": torch.ones(4)})
    exported = export_tensors(policy)
    assert list(exported) == list(name_table(policy.config))
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors.items())


def test_exported_names_shapes_and_dtypes() -> None:
    exported = export_tensors(shared_policy(torch.bfloat16))
    shapes = {
        "model.word_embeddings.weight": [50, 32],
        "model.layers.0.attention.query_key_value.weight": [192, 32],  # lightning: 3 x 4 heads x 16
        "model.layers.1.attention.query_key_value.weight": [128, 32],  # softmax: (4 + 2 x 2) heads x 16
        "model.layers.0.attention.g_norm.weight": [64],
        "model.layers.0.mlp.up_proj.weight": [48, 32],
        "model.layers.4.mlp.gate.expert_bias": [8],
        "model.layers.4.mlp.experts.7.down_proj.weight": [32, 16],
        "model.layers.4.mlp.shared_experts.gate_proj.weight": [24, 32],
    }
    assert {name: list(exported[name].shape) for name in shapes} == shapes
    assert {t.dtype for name, t in exported.items() if not name.endswith("expert_bias")} == {torch.bfloat16}
    assert {t.dtype for name, t in exported.items() if name.endswith("expert_bias")} == {torch.float32}


def test_gate_comes_before_up() -> None:
    policy = shared_policy(torch.float32)
    exported, prefix = export_tensors(policy), "model.layers.1.mlp.experts.3"
    fused = policy.state_dict()["layers.1.mlp.gate_up"][3]
    assert torch.equal(exported[f"{prefix}.gate_proj.weight"], fused[:16])
    assert torch.equal(exported[f"{prefix}.up_proj.weight"], fused[16:])


def test_masters_are_fp32_and_settings_can_be_replaced(folder: Path) -> None:
    policy = load_policy(folder, dtype=torch.float32, chunk_size=64)
    assert (policy.dtype, policy.config.chunk_size) == (torch.float32, 64)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert read_config(folder).chunk_size == 16


def test_sharded_weights_are_read_together(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = list(tensors)
    for part, chosen in enumerate((names[:40], names[40:])):
        save_file({name: tensors[name] for name in chosen}, folder / f"model-0000{part + 1}-of-00002.safetensors")
    assert all(torch.equal(t, tensors[name]) for name, t in export_tensors(load_policy(folder)).items())


def test_tensors_that_do_not_fit_are_listed_together(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.mtp.weight"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(3, 2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit the config") as error:
        load_policy(folder)
    for problem in (
        str(folder),
        "missing model.norm.weight",
        "unexpected model.mtp.weight",
        "lm_head.weight has shape [3, 2], not [50, 32]",
    ):
        assert problem in str(error.value)


def test_long_lists_are_cut(folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(50, 32)}, folder / "model.safetensors")
    absent = len(name_table(make_config())) - 1
    with pytest.raises(ValueError, match=f"and {absent - 10} more"):
        load_policy(folder)


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_truncated_weights_are_refused(kept: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged .*; restore it"):
        load_policy(folder)


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
    with pytest.raises(ValueError, match=r"no \.safetensors file here"):
        load_policy(folder)
    assert not (folder / "exploded").exists()


def test_another_family_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="qwen3", architectures=["Qwen3ForCausalLM"], sliding_window=None)
    with pytest.raises(ValueError, match="model_type = 'qwen3', but this family has 'bailing_moe_linear'") as error:
        load_policy(folder)
    assert str(folder / "config.json") in str(error.value)


def test_unknown_dtype_is_refused(folder: Path) -> None:
    edit_config(folder, torch_dtype="float8")
    with pytest.raises(ValueError, match="torch_dtype 'float8' must be one of bfloat16, float32"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "it has no config.json"), ("{", "is not JSON"), ("[]", "must hold a JSON object")]
)
def test_folder_without_a_usable_config_is_refused(text: str | None, message: str, folder: Path) -> None:
    if text is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_policy(folder)


@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
def test_digest_changes_with_any_bit(data: st.DataObject, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype).view(2, 3)
    digest = tensor_digest(tensor)
    content = tensor.view(torch.uint8)
    byte, bit = data.draw(st.integers(0, content.numel() - 1)), data.draw(st.integers(0, 7))
    content.view(-1)[byte] ^= 1 << bit
    assert tensor_digest(tensor) != digest
    content.view(-1)[byte] ^= 1 << bit
    assert tensor_digest(tensor) == digest


def test_digest_covers_shape_and_dtype_but_not_layout() -> None:
    tensor = torch.zeros(2, 3)
    others = [tensor.t(), tensor.view(6), tensor.int(), tensor[:1]]
    assert len({tensor_digest(t) for t in (tensor, *others)}) == 5
    filled = torch.arange(6.0).view(2, 3)
    assert tensor_digest(filled.t().contiguous().t()) == tensor_digest(filled)


def test_weights_digest_names_the_content(folder: Path) -> None:
    digests = {name: tensor_digest(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    total = weights_digest(digests)
    assert total == save_policy(folder, load_policy(folder))
    assert weights_digest(dict(reversed(digests.items()))) == total
    one, other = list(digests)[:2]
    assert weights_digest(digests | {one: digests[other], other: digests[one]}) != total
