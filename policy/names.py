"""The family's tensor names, one table for both directions: Hugging Face name -> (our tensor, the part of it).

Published checkpoints keep gate, up and every expert apart; the network keeps gate and up fused and experts stacked.
"""

import torch
from torch import Tensor

from policy.config import PolicyConfig
from policy.transformer import Policy

Index = tuple[int | slice, ...]


def name_table(config: PolicyConfig) -> dict[str, tuple[str, Index]]:
    """Every tensor of the family for this config, in the order of the network."""
    table: dict[str, tuple[str, Index]] = {"model.word_embeddings.weight": ("word_embeddings", ())}
    for layer in range(config.num_hidden_layers):
        table |= _layer_names(config, layer)
    return table | {"model.norm.weight": ("norm.weight", ()), "lm_head.weight": ("lm_head", ())}


def _layer_names(config: PolicyConfig, layer: int) -> dict[str, tuple[str, Index]]:
    plain = ["input_layernorm", "post_attention_layernorm"]
    plain += [f"attention.{name}" for name in ("query_key_value", "query_layernorm", "key_layernorm", "dense")]
    if not config.is_softmax(layer):
        plain += ["attention.g_proj", "attention.g_norm"]
    theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
    table: dict[str, tuple[str, Index]] = {f"{theirs}.{name}.weight": (f"{ours}.{name}.weight", ()) for name in plain}
    if not config.is_moe(layer):
        return table | _mlp_names(f"{theirs}.mlp", f"{ours}.mlp", config.intermediate_size)
    table[f"{theirs}.mlp.gate.weight"] = (f"{ours}.mlp.gate.weight", ())
    table[f"{theirs}.mlp.gate.expert_bias"] = (f"{ours}.mlp.expert_bias", ())
    for expert in range(config.num_experts):
        parts = _gate_up_down(f"{theirs}.mlp.experts.{expert}", config.moe_intermediate_size)
        table |= {name: (f"{ours}.mlp.{tensor}", (expert, *index)) for name, (tensor, index) in parts.items()}
    shared = "mlp.shared_experts"
    return table | _mlp_names(f"{theirs}.{shared}", f"{ours}.{shared}", config.moe_shared_expert_intermediate_size)


def _mlp_names(theirs: str, ours: str, width: int) -> dict[str, tuple[str, Index]]:
    return {name: (f"{ours}.{part}.weight", index) for name, (part, index) in _gate_up_down(theirs, width).items()}


def _gate_up_down(theirs: str, width: int) -> dict[str, tuple[str, Index]]:
    return {
        f"{theirs}.gate_proj.weight": ("gate_up", (slice(0, width),)),
        f"{theirs}.up_proj.weight": ("gate_up", (slice(width, 2 * width),)),
        f"{theirs}.down_proj.weight": ("down", ()),
    }


def export_tensors(policy: Policy) -> dict[str, Tensor]:
    """Copies on the CPU under the family's names: weights in the working dtype, expert_bias in FP32."""
    state = policy.state_dict()
    return {
        name: state[ours][index]
        .to("cpu", torch.float32 if name.endswith("expert_bias") else policy.dtype, copy=True)
        .contiguous()
        for name, (ours, index) in name_table(policy.config).items()
    }


def load_tensors(policy: Policy, tensors: dict[str, Tensor]) -> None:
    """Fills a policy in place. Missing, unexpected and mis-shaped tensors are listed together in one ValueError.

    "slope" tensors, which hold the decay the config already fixes, are ignored as the published loaders do.
    """
    table, state = name_table(policy.config), policy.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if "slope" not in name}
    problems = [f"missing {name}" for name in table if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in table]
    for name in table.keys() & given.keys():
        ours, index = table[name]
        if state[ours][index].shape != given[name].shape:
            problems.append(f"{name} has shape {list(given[name].shape)}, not {list(state[ours][index].shape)}")
    if problems:
        listed = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"tensors do not fit the config: {listed}")
    for name, (ours, index) in table.items():
        state[ours][index].copy_(given[name])
