"""The shape of a policy: one config for every size, read from and written to a Hugging Face config.json
(Ring-linear family)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

MODEL_TYPE = "bailing_moe_linear"
# What this family fixes; a config that says otherwise describes another network.
FIXED_FIELDS: dict[str, Any] = {
    "architectures": ["BailingMoeLinearV2ForCausalLM"],
    "model_type": MODEL_TYPE,
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
    "num_nextn_predict_layers": 0,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
}
# Bookkeeping that other tools write and that does not shape the network.
IGNORED_FIELDS = {
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
    "auto_map",
    "bos_token_id",
}
OWN_FIELDS = ("chunk_size", "decay_layer_index")
COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "layer_group_size",
    "num_attention_heads",
    "num_key_value_heads",
    "group_norm_size",
    "intermediate_size",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "max_position_embeddings",
)
HEAD_DIM_MULTIPLE = 8  # attention's products lose their fixed order of summation when their rows are not aligned


@dataclass(frozen=True)
class PolicyConfig:
    """Field names are those of the family's config.json; the last two, OWN_FIELDS, live under its "lockstep" key."""

    vocab_size: int
    hidden_size: int = 128
    num_hidden_layers: int = 4
    layer_group_size: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    group_norm_size: int = 2
    intermediate_size: int = 384
    first_k_dense_replace: int = 1
    moe_intermediate_size: int = 96
    moe_shared_expert_intermediate_size: int = 96
    num_experts: int = 8
    num_experts_per_tok: int = 2
    num_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    eos_token_id: int = 0
    pad_token_id: int = 0
    chunk_size: int = 64
    decay_layer_index: str = "engine"

    def __post_init__(self) -> None:
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"policy config: {name} must be at least 1, got {getattr(self, name)}")
        for got, rule in (
            (
                self.num_attention_heads % self.num_key_value_heads == 0,
                "num_key_value_heads must divide num_attention_heads",
            ),
            (
                self.num_attention_heads * self.head_dim % self.group_norm_size == 0,
                "group_norm_size must divide heads x head_dim",
            ),
            (self.head_dim % HEAD_DIM_MULTIPLE == 0, f"head_dim must be a multiple of {HEAD_DIM_MULTIPLE}"),
            (
                self.rotary_dim % 2 == 0 and 0 < self.rotary_dim <= self.head_dim,
                "head_dim x partial_rotary_factor must be even and at most head_dim",
            ),
            (self.num_experts % self.n_group == 0, "n_group must divide num_experts"),
            (self.topk_group <= self.n_group, "topk_group must not exceed n_group"),
            (
                self.num_experts // self.n_group >= 2,
                "an expert group needs at least 2 experts, its score is the sum of its two best",
            ),
            (
                self.num_experts_per_tok <= self.topk_group * self.num_experts // self.n_group,
                "num_experts_per_tok exceeds the experts in the kept groups",
            ),
            (self.num_shared_experts == 1, "num_shared_experts must be 1"),
            (
                self.chunk_size >= 16 and self.chunk_size & (self.chunk_size - 1) == 0,
                "chunk_size must be a power of two, at least 16",
            ),
            (self.decay_layer_index in ("engine", "hf"), "decay_layer_index must be engine or hf"),
        ):
            if not got:
                raise ValueError(f"policy config: {rule}; got {dataclasses.asdict(self)}")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def is_softmax(self, layer: int) -> bool:
        """The last layer of each group, and a tail that does not fill a group (reference code of the family)."""
        grouped = self.num_hidden_layers // self.layer_group_size * self.layer_group_size
        return (layer + 1) % self.layer_group_size == 0 or layer >= grouped

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    def kv_heads(self, layer: int) -> int:
        """Linear layers keep as many key and value heads as query heads."""
        return self.num_key_value_heads if self.is_softmax(layer) else self.num_attention_heads

    def decay_slopes(self, layer: int) -> list[float]:
        """Per head: -log lambda = s_h f_i (report 2.2.3; the two published conventions of f_i differ by one layer)."""
        index = layer if self.decay_layer_index == "engine" else layer - 1
        factor = 1.0 - index / max(self.num_hidden_layers - 1, 1) + 1e-5
        return [slope * factor for slope in _head_slopes(self.num_attention_heads)]

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """config.json content; dtype is "bfloat16" or "float32"."""
        fields = dataclasses.asdict(self)
        own = {name: fields.pop(name) for name in OWN_FIELDS}
        return {**FIXED_FIELDS, **fields, "torch_dtype": dtype, "lockstep": own}

    @classmethod
    def from_hf(cls, fields: dict[str, Any]) -> "PolicyConfig":
        """Raises ValueError naming every field that is unknown or contradicts the family."""
        fields = dict(fields)
        own, rotary_dim = fields.pop("lockstep", {}), fields.pop("rotary_dim", None)
        known = {field.name for field in dataclasses.fields(cls)} - set(OWN_FIELDS)
        problems = [
            f"{name} = {fields[name]!r}, but this family has {value!r}"
            for name, value in FIXED_FIELDS.items()
            if name in fields and fields[name] != value
        ]
        problems += [
            f"unknown field {name}" for name in sorted(set(fields) - known - set(FIXED_FIELDS) - IGNORED_FIELDS)
        ]
        problems += [f"unknown field lockstep.{name}" for name in sorted(set(own) - set(OWN_FIELDS))]
        if "vocab_size" not in fields:
            problems.append("vocab_size is missing")
        if problems:
            raise ValueError("config.json does not describe a policy that can be built: " + "; ".join(problems))
        config = cls(**{name: value for name, value in fields.items() if name in known}, **own)
        if rotary_dim not in (None, config.rotary_dim):
            raise ValueError(
                f"rotary_dim = {rotary_dim}, but head_dim x partial_rotary_factor gives {config.rotary_dim}; "
                "correct one of them"
            )
        return config


def _head_slopes(heads: int) -> list[float]:
    """ALiBi's slopes: powers of 2^(-8/H); other counts borrow every second slope of the next power of two."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    return slopes if power == heads else slopes + _head_slopes(2 * power)[::2][: heads - power]
