"""FP8 checkpoints: the numbers by hand, the tensors that are converted, and nothing lost on the way back and forth."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from policy.checkpoint import load_policy, save_policy
from policy.checkpoint_fp8 import dequantize, quantize
from policy.names import export_tensors
from tests.policy.tiny import FIELDS, family_config, make_policy, shared_policy

QKV = "model.layers.1.attention.query_key_value.weight"
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(tmp_path, shared_policy(torch.bfloat16), "fp8")
    return tmp_path


def edit(folder: Path, **changes: torch.Tensor) -> None:
    save_file(load_file(folder / "model.safetensors") | changes, folder / "model.safetensors")


def test_hand_worked() -> None:
    """Blocks of a [130, 129] weight: amax 896, 448, 7 and, below the floor, 1e-5."""
    weight = torch.zeros(130, 129)
    weight[0, 0], weight[1, 1], weight[2, 2] = 896.0, -34.0, 38.0  # 17 and 19 lie midway between e4m3 values: to even
    weight[5, 128], weight[129, 0], weight[128, 128] = -448.0, 7.0, 1e-5
    values, scale = quantize(weight)
    assert (values.dtype, values.shape, scale.dtype) == (E4M3, (130, 129), torch.float32)
    assert torch.equal(scale, torch.tensor([[2.0, 1.0], [7 / 448, torch.tensor(1e-4).div(448).item()]]))
    assert [values[at].item() for at in ((0, 0), (1, 1), (2, 2), (5, 128), (129, 0))] == [448, -16, 20, -448, 448]
    assert values[128, 128].item() == 44.0  # 1e-5 / 1e-4 * 448 = 44.8, between 44 and 48
    back = dequantize(values, scale)
    assert [back[at].item() for at in ((0, 0), (1, 1), (2, 2), (5, 128), (129, 0))] == [896, -32, 40, -448, 7]
    assert back.count_nonzero() == 6


@given(st.integers(0, 2**31), st.sampled_from([torch.bfloat16, torch.float32]), st.integers(-20, 20))
def test_what_was_quantised_once_stays_as_it_is(seed: int, dtype: torch.dtype, exponent: int) -> None:
    """Values and scales, also of blocks below the floor and of blocks of zeros: fl(7 fl(m / 7)) / 7 rounds to the same
    scale again, as the error of fl(m / 7), times 7, is less than half a step of m's neighbours away from m."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(200, 300, generator=generator).mul(2.0**exponent).to(dtype)
    weight[:128, :128] = 0
    values, scale = quantize(weight)
    again, scale_again = quantize(dequantize(values, scale))
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(scale_again, scale)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ring", "query_key_value dense gate_proj up_proj down_proj"),
        ("qwen3_moe_mixed", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("llama", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    ],
)
def test_products_of_attention_and_mlp_are_converted_and_nothing_else(name: str, parts: str, tmp_path: Path) -> None:
    policy = make_policy(family_config(name), torch.float32) if name in FIELDS else shared_policy(torch.float32)
    save_policy(tmp_path, policy, "fp8")
    tensors = load_file(tmp_path / "model.safetensors")
    converted = {each for each, tensor in tensors.items() if tensor.dtype == E4M3}
    assert {each.split(".")[-2] for each in converted} == set(parts.split())
    plain = {each for each in tensors if not each.endswith("_scale_inv")} - converted
    assert {each.split(".")[-2] for each in plain} & set(parts.split()) == set()
    assert {each for each in tensors if each.endswith("_scale_inv")} == {f"{each}_scale_inv" for each in converted}
    assert {tensors[each].dtype for each in plain if not each.endswith("expert_bias")} == {torch.bfloat16}
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16"
    kept = fields["quantization_config"].pop("modules_to_not_convert")
    assert set(kept) == {each.removesuffix(".weight") for each in plain if tensors[each].ndim == 2}
    assert fields["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }


def test_masters_are_values_times_scales_in_fp32(folder: Path) -> None:
    tensors, policy = load_file(folder / "model.safetensors"), load_policy(folder)
    masters = policy.state_dict()["layers.1.attention.query_key_value.weight"]
    assert torch.equal(masters, tensors[QKV].float() * tensors[f"{QKV}_scale_inv"])  # one block: [128, 32]
    exact = export_tensors(shared_policy(torch.float32))[QKV]
    apart = (masters - exact).abs()
    assert 0 < apart.max() <= exact.abs().max() / 28  # half a step of the largest values, 448 / 16, or less


def test_scales_in_another_shard_are_found(folder: Path) -> None:
    want = export_tensors(load_policy(folder))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for file, chosen in (("a", False), ("b", True)):
        part = {name: t for name, t in tensors.items() if name.endswith("_scale_inv") == chosen}
        save_file(part, folder / f"{file}.safetensors")
    assert all(torch.equal(tensor, want[name]) for name, tensor in export_tensors(load_policy(folder)).items())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (QKV, torch.zeros(128, 32), f"unexpected {QKV}_scale_inv"),
        (f"{QKV}_scale_inv", torch.ones(2, 1), r"is F32 \[2, 1\], not F32 \[1, 1\] \(in model.safetensors\)"),
        (f"{QKV}_scale_inv", torch.ones(1, 1).bfloat16(), r"is BF16 \[1, 1\], not F32 \[1, 1\]"),
        (f"{QKV}_scale_inv", torch.full((1, 1), float("inf")), f"tensor {QKV} holds NaN or infinity"),
    ],
)
def test_scales_that_do_not_belong_are_refused(name: str, tensor: torch.Tensor, message: str, folder: Path) -> None:
    edit(folder, **{name: tensor})
    with pytest.raises(ValueError, match=message):
        load_policy(folder)


def test_missing_scales_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{QKV}_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"missing {QKV}_scale_inv, the scales of a F8_E4M3 weight"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method = 'gptq', not 'fp8'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size = \[64, 64\], not \[128, 128\]"),
        ({}, "quant_method is missing"),
        ("fp8", "quant_method is missing"),
    ],
)
def test_other_quantisation_is_refused(quantization: object, message: str, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    with pytest.raises(ValueError, match=rf"config\.json: quantization_config: {message}"):
        load_policy(folder)
