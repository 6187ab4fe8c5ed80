"""Qwen3, Qwen3-MoE and Llama: the same function as in transformers, by way of files, in both directions."""

import copy
import dataclasses
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import ops
from policy.checkpoint import load_policy, save_policy
from policy.names import export_tensors, load_tensors, name_table
from policy.transformer import Policy
from tests.policy.tiny import FIELDS, VOCAB, family_config, make_config, make_policy

CASES = pytest.mark.parametrize("name", sorted(FIELDS))
TIED = [name for name, fields in FIELDS.items() if fields.get("tie_word_embeddings")]
# Relative to its size, a hidden state passes about 10 roundings in each of 4 layers, each a sum of up to 64 terms whose
# errors add up as their root: sqrt(40) * 8 = 50 u, u = 2^-24. A log-prob reads it through 32 head weights of size 0.3:
# sqrt(32) * 0.3 = 1.7 of that, 5 sigma in the worst of 64 * 50 entries, and both sides round: sqrt(2).
LOG_PROB_ERROR = 50 * 1.7 * 5 * 2**0.5 * 2**-24  # 3.6e-5


def theirs_of(name: str) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(**copy.deepcopy(FIELDS[name]))  # which it changes
    plain: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **plain)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(0.0, 0.3)
    return model


@cache
def in_transformers(name: str) -> transformers.PreTrainedModel:
    """A new model of the family, every weight away from its neutral value."""
    torch.manual_seed(0)
    return theirs_of(name)


def log_probs_in_transformers(model: transformers.PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids[None]).logits[0].log_softmax(-1)


@pytest.fixture
def saved(name: str, tmp_path: Path) -> Path:
    in_transformers(name).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@CASES
def test_log_probs_and_gradients_are_those_of_transformers(name: str, saved: Path) -> None:
    """Gradients go there and back: twice the error, relative to the largest entry of the tensor."""
    policy, model, ids = load_policy(saved), in_transformers(name), torch.randint(0, VOCAB, (64,))
    want = log_probs_in_transformers(model, ids)
    hidden = policy(ids, ops.ChunkLayout.build([64], 64))
    assert (policy.full_log_probs(hidden, 1.0) - want).abs().max() < LOG_PROB_ERROR
    assert want.std() > 1  # so that the bound means something
    targets, grad = ids.roll(-1), torch.randn(64)
    model.zero_grad()
    (want.gather(1, targets[:, None]).squeeze(1) @ grad).backward()
    (policy.log_probs(hidden, targets, 1.0)[0] @ grad).backward()
    ours = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert all(gradient is not None for gradient in ours.values())
    for theirs, gradient in split_experts(model).items():
        tensor, index = name_table(policy.config)[theirs]
        difference = ours[tensor][index] - gradient
        assert difference.abs().max() <= 2 * LOG_PROB_ERROR * gradient.abs().max(), theirs


def split_experts(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Gradients under the names of the files; in memory transformers stacks experts and joins their gate and up."""
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            gradients[name] = parameter.grad
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, gradient in enumerate(parameter.grad):
            parts = gradient.chunk(2) if kind == "gate_up_proj" else (gradient,)
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for part, values in zip(kinds, parts, strict=True):
                gradients[f"{prefix}.{expert}.{part}.weight"] = values
    return gradients


@CASES
def test_transformers_reads_our_export(name: str, tmp_path: Path) -> None:
    policy, ids = make_policy(family_config(name), torch.float32), torch.randint(0, VOCAB, (64,))
    save_policy(tmp_path, policy)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not any(report.values()), report
    with torch.no_grad():
        ours = policy.full_log_probs(policy(ids, ops.ChunkLayout.build([64], 16)), 1.0)
        assert (log_probs_in_transformers(model, ids) - ours).abs().max() < LOG_PROB_ERROR
    assert ours.std() > 1
    assert load_policy(tmp_path).config == policy.config


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_of_import_is_the_same_bytes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = in_transformers(name)
    torch.manual_seed(0)
    theirs_of(name).to(dtype).save_pretrained(tmp_path / "theirs")
    save_policy(tmp_path / "ours", load_policy(tmp_path / "theirs"))
    theirs, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for tensor, values in theirs.items():
        assert ours[tensor].dtype == values.dtype == dtype
        assert torch.equal(ours[tensor], values), tensor
    assert sum(values.numel() for values in theirs.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen3_moe"])
def test_names_shapes_and_places(name: str) -> None:
    exported = export_tensors(make_policy(family_config(name), torch.float32))
    shapes = {
        "model.embed_tokens.weight": [50, 32],
        "model.layers.2.self_attn.q_proj.weight": [64, 32],
        "model.layers.2.self_attn.k_proj.weight": [32, 32],
        "model.layers.2.self_attn.o_proj.weight": [32, 64],
        "lm_head.weight": [50, 32],
    }
    shapes |= {} if name == "llama" else {"model.layers.0.self_attn.q_norm.weight": [16]}
    shapes |= {"model.layers.0.mlp.experts.7.down_proj.weight": [32, 16]} if name == "qwen3_moe" else {}
    assert {tensor: list(exported[tensor].shape) for tensor in shapes} == shapes
    # 3 at the ends; in a layer 2 norms, 4 projections, q and k norm, gate and up and down, or a router and 8 experts.
    assert len(exported) == 3 + 3 * {"qwen3": 11, "llama": 9, "qwen3_moe": 2 + 4 + 2 + 1 + 8 * 3}[name]


def test_q_comes_before_k_and_v() -> None:
    policy = make_policy(family_config("qwen3"), torch.float32)
    fused, exported = policy.state_dict()["layers.1.attention.query_key_value.weight"], export_tensors(policy)
    for part, rows in (("q", slice(0, 64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
        assert torch.equal(exported[f"model.layers.1.self_attn.{part}_proj.weight"], fused[rows])


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_is_one_parameter(name: str) -> None:
    policy = make_policy(family_config(name), torch.bfloat16)
    assert "lm_head.weight" not in export_tensors(policy)
    assert "lm_head" not in dict(policy.named_parameters())
    policy.to_working_dtype()
    assert policy.lm_head is policy.word_embeddings
    assert policy.lm_head.dtype == torch.bfloat16


def test_a_stored_copy_of_a_tied_head_must_be_a_copy() -> None:
    """The checkpoint of Qwen3-0.6B holds one."""
    policy = make_policy(family_config("qwen3_tied"), torch.bfloat16)
    tensors = export_tensors(policy)
    load_tensors(policy, {"lm_head.weight": tensors["model.embed_tokens.weight"]} | tensors)
    for head, problem in (
        (tensors["model.embed_tokens.weight"] + 1, "tie_word_embeddings is true, but lm_head.weight differs"),
        (torch.zeros(2, 2), r"lm_head.weight has shape \[2, 2\], not \[50, 32\]"),
    ):
        with pytest.raises(ValueError, match=problem):
            load_tensors(policy, tensors | {"lm_head.weight": head})


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("qwen3", "model.layers.1.self_attn.q_proj.weight", [32, 32]),
        ("llama", "model.layers.2.self_attn.k_proj.weight", [64, 32]),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj.weight", [48, 32]),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight", [4, 32]),
    ],
)
def test_tensors_of_another_width_are_named(name: str, tensor: str, shape: list[int]) -> None:
    policy = make_policy(family_config(name), torch.float32)
    tensors = export_tensors(policy) | {tensor: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"{tensor} has shape ") as error:
        load_tensors(policy, tensors)
    assert str(shape) in str(error.value)


def test_tensors_of_another_family_are_named() -> None:
    tensors = export_tensors(make_policy(family_config("qwen3"), torch.float32))
    policy = make_policy(family_config("llama"), torch.float32)
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.0\.self_attn\.q_norm\.weight"):
        load_tensors(policy, tensors)


def test_stored_rotary_angles_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    policy = make_policy(family_config("llama"), torch.float32)
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    with caplog.at_level(logging.WARNING):
        load_tensors(policy, export_tensors(policy) | angles)
    assert not caplog.records


def test_layers_that_predict_further_tokens_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Under their own name or behind the last of 5 layers, as many as the config announces."""
    policy = make_policy(make_config(), torch.float32)
    further = {name: torch.ones(1) for name in ("model.mtp.norm.weight", "model.layers.5.eh_proj.weight")}
    tensors = export_tensors(policy) | further
    with pytest.raises(ValueError, match=r"unexpected model\.mtp\.norm\.weight; unexpected model\.layers\.5\.eh_proj"):
        load_tensors(policy, tensors)
    announced = make_policy(dataclasses.replace(make_config(), num_nextn_predict_layers=1), torch.float32)
    with caplog.at_level(logging.WARNING):
        load_tensors(announced, tensors)
    (record,) = caplog.messages
    assert record.endswith("not loaded, nor will they be exported: " + "; ".join(further))
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.6\.eh_proj"):
        load_tensors(announced, tensors | {"model.layers.6.eh_proj.weight": torch.ones(1)})


@CASES
def test_masters_are_fp32_and_initialised(name: str) -> None:
    policy = Policy(family_config(name), torch.bfloat16)
    policy.initialize(3)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in policy.parameters())
