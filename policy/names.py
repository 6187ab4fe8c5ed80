"""The families' tensor names, one table for both directions: Hugging Face name -> (our tensor, the part of it).

Published checkpoints keep gate, up and every expert apart, and most keep q, k and v apart; the network keeps gate and
up fused, q, k and v fused, and experts stacked.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.config import PolicyConfig
from policy.families import RING_LINEAR
from policy.transformer import Policy

Index = tuple[int | slice, ...]
Table = dict[str, tuple[str, Index]]
logger = logging.getLogger(__name__)
LISTED = 10  # problems spelled out in one message
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class _Words:
    """What a family calls things that the network calls as Ring-linear does."""

    embeddings: str
    attention: str
    query_norm: str
    key_norm: str
    output: str
    fused_qkv: bool


_LLAMA = _Words("embed_tokens", "self_attn", "q_norm", "k_norm", "o_proj", fused_qkv=False)
WORDS = {
    RING_LINEAR: _Words("word_embeddings", "attention", "query_layernorm", "key_layernorm", "dense", fused_qkv=True),
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "llama": _LLAMA,
}


def name_table(config: PolicyConfig) -> Table:
    """Every tensor of the family for this config, in the order of the network."""
    table: Table = {f"model.{WORDS[config.model_type].embeddings}.weight": ("word_embeddings", ())}
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table[f"{theirs}.{norm}.weight"] = (f"{ours}.{norm}.weight", ())
        table |= _attention_names(config, layer, f"{ours}.attention")
        if config.is_moe(layer):
            table |= _moe_names(config, f"{theirs}.mlp", f"{ours}.mlp")
        else:
            table |= _mlp_names(f"{theirs}.mlp", f"{ours}.mlp", config.intermediate_size)
    table["model.norm.weight"] = ("norm.weight", ())
    return table if config.tie_word_embeddings else table | {HEAD: ("lm_head", ())}


def _attention_names(config: PolicyConfig, layer: int, ours: str) -> Table:
    words = WORDS[config.model_type]
    theirs = f"model.layers.{layer}.{words.attention}"
    table: Table = _qkv_names(config, layer, theirs, f"{ours}.query_key_value.weight")
    plain = {words.query_norm: "query_layernorm", words.key_norm: "key_layernorm"} if config.use_qk_norm else {}
    plain[words.output] = "dense"
    if not config.is_softmax(layer):
        plain |= {"g_proj": "g_proj", "g_norm": "g_norm"}
    return table | {f"{theirs}.{name}.weight": (f"{ours}.{part}.weight", ()) for name, part in plain.items()}


def _qkv_names(config: PolicyConfig, layer: int, theirs: str, ours: str) -> Table:
    if WORDS[config.model_type].fused_qkv:
        return {f"{theirs}.query_key_value.weight": (ours, ())}
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.kv_heads(layer)))
    return {
        f"{theirs}.q_proj.weight": (ours, (slice(0, q),)),
        f"{theirs}.k_proj.weight": (ours, (slice(q, q + kv),)),
        f"{theirs}.v_proj.weight": (ours, (slice(q + kv, q + 2 * kv),)),
    }


def _moe_names(config: PolicyConfig, theirs: str, ours: str) -> Table:
    table: Table = {f"{theirs}.gate.weight": (f"{ours}.gate.weight", ())}
    if config.moe_router_enable_expert_bias:
        table[f"{theirs}.gate.expert_bias"] = (f"{ours}.expert_bias", ())
    for expert in range(config.num_experts):
        parts = _gate_up_down(f"{theirs}.experts.{expert}", config.moe_intermediate_size)
        table |= {name: (f"{ours}.{tensor}", (expert, *index)) for name, (tensor, index) in parts.items()}
    if config.num_shared_experts:
        width = config.moe_shared_expert_intermediate_size
        table |= _mlp_names(f"{theirs}.shared_experts", f"{ours}.shared_experts", width)
    return table


def _mlp_names(theirs: str, ours: str, width: int) -> Table:
    return {name: (f"{ours}.{part}.weight", index) for name, (part, index) in _gate_up_down(theirs, width).items()}


def _gate_up_down(theirs: str, width: int) -> Table:
    return {
        f"{theirs}.gate_proj.weight": ("gate_up", (slice(0, width),)),
        f"{theirs}.up_proj.weight": ("gate_up", (slice(width, 2 * width),)),
        f"{theirs}.down_proj.weight": ("down", ()),
    }


def named_views(policy: Policy) -> dict[str, Tensor]:
    """The family's tensors as views of the policy's own memory: what is copied into one is in the policy."""
    state = policy.state_dict()
    return {name: state[ours][index] for name, (ours, index) in name_table(policy.config).items()}


def export_tensors(policy: Policy) -> dict[str, Tensor]:
    """Copies on the CPU under the family's names, in the working dtype."""
    return {name: export_tensor(name, view, policy.dtype) for name, view in named_views(policy).items()}


def export_tensor(name: str, view: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy on the CPU, as a checkpoint of `dtype` holds it."""
    return view.to("cpu", export_dtype(name, dtype), copy=True).contiguous()


def export_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """expert_bias is FP32 in every checkpoint."""
    return torch.float32 if name.endswith("expert_bias") else dtype


def load_tensors(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    """Fills a policy in place. Raises ValueError as `check_tensors` and `fill` do."""
    check_tensors(policy, {name: tensor.shape for name, tensor in tensors.items()})
    fill(policy, tensors.items())


def check_tensors(policy: Policy, shapes: Mapping[str, Sequence[int]], files: Mapping[str, str] | None = None) -> None:
    """Missing, unexpected and mis-shaped tensors are listed together in one ValueError; a tensor that is left out on
    purpose is logged where it holds weights. files: where a tensor was found, for the message."""
    place = {name: f" (in {file})" for name, file in (files or {}).items()}
    views, config = named_views(policy), policy.config
    given = {name: list(shape) for name, shape in shapes.items() if not _fixed_by_config(name)}
    further = [name for name in given if _predicts_further_tokens(config, name)]
    wanted = {name: list(view.shape) for name, view in views.items()}
    if config.tie_word_embeddings and HEAD in given:
        wanted[HEAD] = list(policy.lm_head.shape)
    problems = [f"missing {name}" for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted and name not in further]
    problems += [f"unexpected {name}{place.get(name, '')}" for name in unexpected]
    problems += [
        f"{name} has shape {given[name]}, not {shape}{place.get(name, '')}"
        for name, shape in wanted.items()
        if given.get(name, shape) != shape
    ]
    if problems:
        raise ValueError(f"tensors do not fit the config: {_listed(problems)}")
    if further:
        logger.warning(
            "the layers that predict further tokens are not loaded, nor will they be exported: %s", _listed(further)
        )


@torch.no_grad()
def fill(policy: Policy, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copies checked tensors into the policy, one by one in any order.

    Raises ValueError when the config ties the head to the embeddings and the tensors hold another head.
    """
    views, head = named_views(policy), None
    for name, tensor in tensors:
        if name in views:
            views[name].copy_(tensor.to(export_dtype(name, policy.dtype)) if policy.is_rounded else tensor)
        elif name == HEAD:
            head = tensor
    if head is not None and not torch.equal(head.to(policy.lm_head), policy.lm_head):
        embeddings = WORDS[policy.config.model_type].embeddings
        raise ValueError(
            f"tie_word_embeddings is true, but {HEAD} differs from model.{embeddings}.weight; set it to false in "
            "config.json to keep both, or remove the head"
        )


def _fixed_by_config(name: str) -> bool:
    """Decay and rotary angles, which some checkpoints store and published loaders pass over."""
    return "slope" in name or name.endswith("rotary_emb.inv_freq")


def _predicts_further_tokens(config: PolicyConfig, name: str) -> bool:
    """Multi-token prediction: under its own name, or as layers behind the last."""
    first, count = config.num_hidden_layers, config.num_nextn_predict_layers
    layers = tuple(f"model.layers.{layer}." for layer in range(first, first + count))
    return count > 0 and name.startswith(("model.mtp.", *layers))


def _listed(items: Sequence[str]) -> str:
    return "; ".join(items[:LISTED]) + (f"; and {len(items) - LISTED} more" if len(items) > LISTED else "")
