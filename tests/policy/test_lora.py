"""LoRA: the merge by hand, the same bits with and without adapters in place, and peft's names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ops
from policy.config import PolicyConfig
from policy.lora import Adapter, LoraLinear, adapter_tensors, add_adapters, chosen_modules, merged, save_adapter
from policy.lora_config import LoraConfig
from policy.names import export_tensors, load_tensors
from policy.transformer import Linear, Policy
from tests.policy.tiny import make_config, make_policy

LORA = LoraConfig(rank=3, alpha=6, targets=("query_key_value", "dense", "g_proj", "gate_proj", "up_proj", "down_proj"))
DTYPES = [torch.float32, torch.bfloat16]
IDS = torch.arange(40) * 7 % 50
QWEN = PolicyConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 96,
        "eos_token_id": 0,
    }
)


def hidden(policy: Policy) -> Tensor:
    found: Tensor = policy(IDS, ops.ChunkLayout.build([25, 15], policy.config.chunk_size))
    return found


def adapted(dtype: torch.dtype, lora: LoraConfig = LORA, config: PolicyConfig | None = None) -> Policy:
    """With adapters that do change something, as after training."""
    policy = add_adapters(make_policy(config or make_config(), dtype), lora, seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in policy.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return policy


def test_the_merge_by_hand() -> None:
    """W = 1 2 / 3 4 / 5 6; rank 1, alpha 2; rows 1 to 2 get 2 B A with A = 1 -1 and B = 10, 0.5."""
    linear = Linear(2, 3, torch.float32)
    linear.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    adapter = Adapter(slice(1, 3), 2, 1, torch.Generator())
    adapter.lora_A.data, adapter.lora_B.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[10.0], [0.5]])
    lora = LoraLinear(linear, {"up_proj": adapter}, scale=2.0)
    assert lora.merged_weight().tolist() == [[1.0, 2.0], [23.0, -16.0], [6.0, 5.0]]
    assert lora(torch.tensor([[1.0, 1.0]])).tolist() == [[3.0, 7.0, 11.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fresh_adapters_change_no_bit(dtype: torch.dtype) -> None:
    plain = make_policy(make_config(), dtype)
    expected = hidden(plain)
    assert torch.equal(hidden(add_adapters(plain, LORA, seed=0)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_engine_with_the_merged_weights_has_the_same_bits(dtype: torch.dtype) -> None:
    """In the working dtype and without adapters, as weight sync leaves it; and as an FP32 policy that is trained on."""
    policy = adapted(dtype)
    with_adapters = hidden(policy)
    assert not torch.equal(with_adapters, hidden(make_policy(make_config(), dtype)))
    tensors = export_tensors(merged(policy))
    for other in (Policy(make_config(), dtype).to_working_dtype(), Policy(make_config(), dtype)):
        load_tensors(other, tensors)
        assert torch.equal(hidden(other), with_adapters)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_adapters_get_gradients_and_those_are_of_the_merged_weight(dtype: torch.dtype) -> None:
    """dB = s dW' A^T and dA = s B^T dW', with dW' from a policy whose masters are the merged weights."""
    policy, whole = adapted(dtype), make_policy(make_config(), dtype)
    load_tensors(whole, {name: tensor.float() for name, tensor in export_tensors(merged(policy)).items()})
    for each in (policy, whole):
        hidden(each).square().sum().backward()
    trained = [name for name, parameter in policy.named_parameters() if parameter.grad is not None]
    assert trained == [name for name, _ in policy.named_parameters() if ".adapters." in name]
    module = policy.get_submodule("layers.0.mlp.gate_up")
    assert isinstance(module, LoraLinear)
    (gate, first), (up, second) = module.named_adapters()
    gradient = whole.get_parameter("layers.0.mlp.gate_up.weight").grad
    assert (gate, up, first.rows, second.rows) == ("gate_proj", "up_proj", slice(0, 48), slice(48, 96))
    for adapter in (first, second):
        assert gradient is not None and adapter.lora_A.grad is not None and adapter.lora_B.grad is not None
        rows = gradient[adapter.rows]
        torch.testing.assert_close(adapter.lora_B.grad, 2.0 * rows @ adapter.lora_A.detach().T)
        torch.testing.assert_close(adapter.lora_A.grad, 2.0 * adapter.lora_B.detach().T @ rows)


def test_the_merged_policy_shares_what_is_frozen() -> None:
    policy = adapted(torch.bfloat16)
    plain = merged(policy)
    assert plain.state_dict().keys() == make_policy(make_config(), torch.bfloat16).state_dict().keys()
    assert plain.lm_head.data_ptr() == policy.lm_head.data_ptr()
    assert merged(make_policy(make_config(), torch.float32)).word_embeddings.requires_grad


def test_initial_adapters_follow_the_seed() -> None:
    first, again, other = (adapter_tensors(add_adapters(make_policy(QWEN, torch.float32), lora, seed)) for lora, seed in
                           ((_qwen_lora(), 0), (_qwen_lora(), 0), (_qwen_lora(), 1)))  # fmt: skip
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert first[name].abs().max() <= 32**-0.5 and first[name].std() > 0.08  # uniform: 32^-0.5 / 3^0.5 = 0.102
    assert not any(tensor.any() for name, tensor in first.items() if "lora_B" in name)


def _qwen_lora() -> LoraConfig:
    return LoraConfig(rank=4, alpha=4, targets=("k_proj", "up_proj"))


def test_names_and_shapes_are_pefts() -> None:
    """What peft's own `get_peft_model(...).save_pretrained` calls them; q, k and v are one matrix in our network."""
    prefix = "base_model.model.model.layers.0"
    tensors = adapter_tensors(adapted(torch.float32, _qwen_lora(), QWEN))
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        f"{prefix}.self_attn.k_proj.lora_A.weight": [4, 32],
        f"{prefix}.self_attn.k_proj.lora_B.weight": [32, 4],
        f"{prefix}.mlp.up_proj.lora_A.weight": [4, 32],
        f"{prefix}.mlp.up_proj.lora_B.weight": [48, 4],
    }


def test_what_peft_reads(tmp_path: Path) -> None:
    lora = LoraConfig(rank=3, alpha=6, targets=("dense", "down_proj"))
    policy = adapted(torch.bfloat16, lora)
    save_adapter(tmp_path, policy, lora, "some/base")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored.keys() == adapter_tensors(policy).keys() and {each.dtype for each in stored.values()} == {
        torch.float32
    }
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (content["peft_type"], content["r"], content["lora_alpha"], content["lora_dropout"]) == ("LORA", 3, 6.0, 0.0)
    assert content["base_model_name_or_path"] == "some/base"
    dense = [f"model.layers.{layer}.attention.dense" for layer in range(5)]
    down = ["model.layers.0.mlp.down_proj", *(f"model.layers.{n}.mlp.shared_experts.down_proj" for n in range(1, 5))]
    assert sorted(content["target_modules"]) == sorted(dense + down)
    assert {name.rsplit(".lora_", 1)[0].removeprefix("base_model.model.") for name in stored} == {*dense, *down}


def test_the_adapter_and_the_base_make_the_merged_weight(tmp_path: Path) -> None:
    """By whoever reads the files: W + alpha / rank B A, rounded once."""
    policy = adapted(torch.bfloat16)
    save_adapter(tmp_path, policy, LORA, "base")
    stored, base = (
        load_file(tmp_path / "adapter_model.safetensors"),
        export_tensors(make_policy(make_config(), torch.bfloat16)),
    )
    exported = export_tensors(merged(policy))
    for module in chosen_modules(make_config(), LORA):
        a, b = (stored[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        expected = (base[f"{module}.weight"].float() + 2.0 * (b @ a)).bfloat16()
        assert torch.equal(exported[f"{module}.weight"], expected)
    others = exported.keys() - {f"{module}.weight" for module in chosen_modules(make_config(), LORA)}
    assert others and all(torch.equal(exported[name], base[name]) for name in others)


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (make_config(), "dense, down_proj, g_proj, gate_proj, query_key_value, up_proj"),
        (QWEN, "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    ],
    ids=["ring", "qwen3"],
)
def test_an_unknown_target_is_refused_and_leaves_the_policy_alone(config: PolicyConfig, known: str) -> None:
    policy = make_policy(config, torch.float32)
    with pytest.raises(
        ValueError, match=f"^lora.targets: gate: a {config.model_type} policy can be adapted in {known};"
    ):
        add_adapters(policy, LoraConfig(rank=1, alpha=1, targets=("gate",)), seed=0)
    assert all(parameter.requires_grad for parameter in policy.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "greater than or equal to 1"),
        ({"alpha": 0}, "greater than 0"),
        ({"targets": []}, "at least 1 item"),
        ({"targets": ["dense", "dense"]}, "dense is listed twice"),
        ({"dropout": 0.1}, "must be 0, got 0.1: with dropout, trainer and sampler compute different policies"),
        ({"bias": "all"}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_be_trained(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig.model_validate({"rank": 1, "alpha": 1, "targets": ["dense"], **change})
