"""Policies on disk: what is written is what is read, to the bit, in every family, sharded or not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from policy.checkpoint import load_policy, read_config, read_dtype, save_policy
from policy.config import PolicyConfig
from policy.digest import tensor_digest, weights_digest
from policy.names import export_tensors, load_tensors, name_table
from policy.transformer import Policy
from tests.policy.tiny import FIELDS, family_config, make_config, make_policy, shared_policy

DTYPES = [torch.float32, torch.bfloat16]
FAMILIES = {"bailing_moe_linear": make_config(), **{name: family_config(name) for name in sorted(FIELDS)}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(tmp_path / "policy", shared_policy(torch.bfloat16))
    return tmp_path / "policy"


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def stored_digests(folder: Path) -> dict[str, str]:
    return {name: tensor_digest(tensor) for name, tensor in stored(folder).items()}


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000], ids=["whole", "sharded"])
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_export_of_import_is_the_same_bytes(
    config: PolicyConfig, max_shard_bytes: int, dtype: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    digest = save_policy(first, make_policy(config, torch.float32), dtype, max_shard_bytes)
    loaded = load_policy(first)
    assert loaded.config == config
    assert save_policy(second, loaded, dtype, max_shard_bytes) == digest == weights_digest(stored_digests(first))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert (len(names) > 3) == (max_shard_bytes == 20_000)
    for name in names:
        assert (second / name).read_bytes() == (first / name).read_bytes(), name


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


def test_export_in_fp32_keeps_the_masters_of_a_bf16_policy(tmp_path: Path) -> None:
    policy = shared_policy(torch.bfloat16)
    save_policy(tmp_path, policy, "float32")
    assert read_dtype(tmp_path) == torch.float32
    state, loaded = policy.state_dict(), load_policy(tmp_path, torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], master) for name, master in state.items())


def test_what_came_with_the_policy_goes_along_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    files = {
        "tokenizer.json": b'{"odd":  "spacing"}\r\n',
        "tokenizer.model": b"\x00\xff",
        "chat_template.jinja": "{{ messages }} \u2028".encode(),
        "additional_chat_templates/tool.jinja": b"{{ tools }}",
        "generation_config.json": b'{"temperature":0.6}',
        "modeling_bailing.py": b"raise SystemExit",
        "LICENSE": b"MIT",
    }
    (folder / "additional_chat_templates").mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "pytorch_model.bin").write_bytes(b"no")
    (folder / "lockstep.json").write_text("{}")
    edit_config(folder, bos_token_id=7, auto_map={"AutoModel": "modeling_bailing.Model"}, dtype="bfloat16")
    out = tmp_path / "out"
    save_policy(out, load_policy(folder), "float32", source=folder)
    kept = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert kept == sorted([*files, "config.json", "model.safetensors"])
    assert {name: (out / name).read_bytes() for name in files} == files
    fields = json.loads((out / "config.json").read_text())
    assert (fields["bos_token_id"], fields["auto_map"]) == (7, {"AutoModel": "modeling_bailing.Model"})
    assert (fields["torch_dtype"], "dtype" in fields) == ("float32", False)
    assert read_config(out) == read_config(folder)


def test_new_weights_outdate_the_manifest(folder: Path) -> None:
    (folder / "lockstep.json").write_text(json.dumps({"tensor_digests": {"lm_head.weight": "0"}}))
    save_policy(folder, shared_policy(torch.bfloat16))
    assert not (folder / "lockstep.json").exists()
    load_policy(folder)


def test_unknown_export_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be saved as 'int4'; choose one of bfloat16, float32, fp8"):
        save_policy(tmp_path / "out", shared_policy(torch.float32), "int4")
    assert not (tmp_path / "out").exists()


def test_config_of_another_family_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="mamba")
    with pytest.raises(ValueError, match=r"config\.json: model_type = 'mamba' cannot be built; the families are"):
        load_policy(folder)


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
