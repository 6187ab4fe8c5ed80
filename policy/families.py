"""The model families, by Hugging Face `model_type`: what config.json says in each, and what it leaves unsaid.

A family is data. `PolicyConfig` has the fields of all families under Hugging Face's names; a family tells which of them
its config.json carries, what the others are, and which further fields have a single value that can be built.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from policy.rope import Llama3Scaling

RING_LINEAR = "bailing_moe_linear"
# Bookkeeping that other tools write and that does not shape the network.
BOOKKEEPING = {
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
    "auto_map",
    "bos_token_id",
}


@dataclass(frozen=True)
class Family:
    fixed: dict[str, Any]  # config.json: fields with the one value that can be built; written by an export
    carried: tuple[str, ...]  # config.json: fields of PolicyConfig
    required: tuple[str, ...]  # those of them that have no default
    own: tuple[str, ...]  # those of PolicyConfig that lie under "lockstep"
    shared: dict[str, Any] = field(default_factory=dict)  # fields of PolicyConfig that are the same in the whole family
    ignored: frozenset[str] = frozenset()  # config.json: fields that do not shape the network in this family
    unsaid: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {}  # what absent fields mean


def read_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> arguments of PolicyConfig. ValueError names every field that is unknown or contradictory."""
    model_type = fields.get("model_type", RING_LINEAR)
    family = find_family(model_type)
    problems: list[str] = []
    given = _standard_names(fields, problems)
    problems += _contradictions(family, given)
    scaling = _read_scaling(given["rope_scaling"], problems) if "rope_scaling" in family.carried else None
    if problems:
        listed = "; ".join(problems)
        raise ValueError(f"config.json does not describe a {model_type} policy that can be built: {listed}")
    values = {name: _hashable(given[name]) for name in family.carried if given.get(name) is not None}
    values |= {"model_type": model_type, "rope_scaling": scaling}
    return {**family.shared, **family.unsaid(values), **values, **given.get("lockstep", {})}


def _contradictions(family: Family, given: dict[str, Any]) -> Iterator[str]:
    for name, value in family.fixed.items():
        if name in given and name not in family.carried and given[name] != value:
            yield f"{name} = {given[name]!r}, but this family has {value!r}"
    known = {*family.fixed, *family.carried, *family.ignored, *BOOKKEEPING, "lockstep"}
    yield from (f"unknown field {name}" for name in sorted(given.keys() - known))
    yield from (f"unknown field lockstep.{name}" for name in sorted(set(given.get("lockstep", {})) - set(family.own)))
    yield from (f"{name} is missing" for name in family.required if given.get(name) is None)
    if "layer_types" in family.ignored and set(given.get("layer_types") or ()) - {"full_attention"}:
        yield f"layer_types = {given['layer_types']!r}: only full_attention can be built"


def write_fields(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The way back, from `dataclasses.asdict` of a PolicyConfig."""
    family = find_family(values["model_type"])
    if values["rope_scaling"] is not None:
        values = values | {"rope_scaling": {"rope_type": "llama3", **values["rope_scaling"]}}
    carried = {name: _jsonable(values[name]) for name in family.carried if name not in family.fixed}
    return {**family.fixed, **carried, "torch_dtype": dtype, "lockstep": {name: values[name] for name in family.own}}


def find_family(model_type: object) -> Family:
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ValueError(f"model_type = {model_type!r} cannot be built; the families are {', '.join(sorted(FAMILIES))}")
    return family


def _standard_names(fields: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Transformers 5 moved the rotary fields into one and renamed the number of experts; older names stand here."""
    given = dict(fields)
    renamed = {"num_experts": given.pop("num_local_experts")} if "num_local_experts" in given else {}
    rope = given.pop("rope_parameters", None) or {}
    if not isinstance(rope, dict):
        problems.append(f"rope_parameters = {rope!r} is not an object")
    elif rope:
        renamed |= {name: value for name, value in rope.items() if name == "rope_theta"}
        renamed["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    for name, value in renamed.items():
        if given.get(name, value) not in (None, value):
            problems.append(f"{name} = {given[name]!r} here and {value!r} there")
        given[name] = value
    if given.setdefault("rope_scaling", None) in ({"rope_type": "default"}, {"type": "default"}, {}):
        given["rope_scaling"] = None
    return given


def _read_scaling(value: Any, problems: list[str]) -> Llama3Scaling | None:
    if value is None:
        return None
    names = {each.name for each in dataclasses.fields(Llama3Scaling)}
    kind = value.get("rope_type", value.get("type")) if isinstance(value, dict) else value
    if kind != "llama3":
        problems.append(f"rope_scaling of type {kind!r}: only llama3 can be built")
        return None
    numbers: dict[str, Any] = {name: number for name, number in value.items() if isinstance(number, int | float)}
    if numbers.keys() != names or value.keys() - names - {"rope_type", "type"}:
        problems.append(f"rope_scaling of type llama3 needs just the numbers {', '.join(sorted(names))}; got {value!r}")
        return None
    return Llama3Scaling(**numbers)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _unsaid(values: dict[str, Any]) -> dict[str, Any]:
    """Llama's config.json may leave out what follows from the number of heads, and most leave out the padding."""
    heads, hidden, eos = values["num_attention_heads"], values["hidden_size"], values["eos_token_id"]
    pad = eos[0] if isinstance(eos, tuple) else eos
    head_dim = {"head_dim": hidden // heads} if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 else {}
    return {"num_key_value_heads": heads, "pad_token_id": pad, **head_dim}


_RING_LINEAR = Family(
    fixed={
        "architectures": ["BailingMoeLinearV2ForCausalLM"],
        "model_type": RING_LINEAR,
        "hidden_act": "silu",
        "linear_silu": False,
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "use_bias": False,
        "use_qkv_bias": False,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "rope_scaling": None,
        "num_nextn_predict_layers": 0,  # Read as it comes; an export has none, they are not loaded.
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
    },
    carried=(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "layer_group_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "group_norm_size",
        "intermediate_size",
        "first_k_dense_replace",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "num_shared_experts",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "partial_rotary_factor",
        "rope_theta",
        "max_position_embeddings",
        "rms_norm_eps",
        "initializer_range",
        "eos_token_id",
        "pad_token_id",
        "num_nextn_predict_layers",
    ),
    required=("vocab_size",),
    own=("chunk_size", "fp8_linear", "decay_layer_index"),
)

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "eos_token_id",
)
_HEADS = ("num_key_value_heads", "head_dim")
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
_OPTIONAL = ("rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings", "initializer_range", "pad_token_id")
# Softmax attention in every layer, rotation of whole heads, no shared expert, no bias on the router.
_SOFTMAX_ONLY = {
    "layer_group_size": 1,
    "partial_rotary_factor": 1.0,
    "first_k_dense_replace": 0,
    "num_shared_experts": 0,
    "score_function": "softmax",
    "moe_router_enable_expert_bias": False,
}
_QWEN_FIXED = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False}
_QWEN_IGNORED = frozenset({"sliding_window", "max_window_layers", "layer_types"})  # all of them off

_QWEN3 = Family(
    fixed={"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **_QWEN_FIXED},
    carried=(*_SIZES, *_HEADS, *_OPTIONAL),
    required=(*_SIZES, *_HEADS),
    own=("chunk_size", "fp8_linear"),
    shared={**_SOFTMAX_ONLY, "num_experts": 0},
    ignored=_QWEN_IGNORED,
    unsaid=_unsaid,
)
_QWEN3_MOE = Family(
    fixed={"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **_QWEN_FIXED},
    carried=(*_SIZES, *_HEADS, *_EXPERTS, "decoder_sparse_step", "mlp_only_layers", *_OPTIONAL),
    required=(*_SIZES, *_HEADS, *_EXPERTS),
    own=("chunk_size", "fp8_linear"),
    shared=_SOFTMAX_ONLY,
    ignored=_QWEN_IGNORED | {"output_router_logits", "router_aux_loss_coef"},
    unsaid=_unsaid,
)
_LLAMA = Family(
    fixed={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
    },
    carried=(*_SIZES, *_HEADS, *_OPTIONAL),
    required=_SIZES,
    own=("chunk_size", "fp8_linear"),
    shared={**_SOFTMAX_ONLY, "num_experts": 0, "use_qk_norm": False},
    unsaid=_unsaid,
)
FAMILIES = {RING_LINEAR: _RING_LINEAR, "qwen3": _QWEN3, "qwen3_moe": _QWEN3_MOE, "llama": _LLAMA}
