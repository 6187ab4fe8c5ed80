"""The shape of a policy: one config for every family and size, read from and written to a Hugging Face config.json."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from policy.families import RING_LINEAR, find_family, read_fields, write_fields
from policy.rope import Llama3Scaling

Rule = tuple[bool, str]
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
    "decoder_sparse_step",
    "n_group",
    "topk_group",
    "max_position_embeddings",
)
HEAD_DIM_MULTIPLE = 8  # attention's products lose their fixed order of summation when their rows are not aligned
KINDS: dict[object, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
}


@dataclass(frozen=True)
class PolicyConfig:
    """Field names are Hugging Face's; chunk_size, decay_layer_index and fp8_linear are ours, under the key "lockstep".

    A family (`policy.families`) says which fields its config.json carries; the others have one value for all of it.
    Defaults are those of Ring-linear in the size of a toy. Raises ValueError naming the field and the rule.
    """

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
    eos_token_id: int | tuple[int, ...] = 0
    pad_token_id: int = 0
    chunk_size: int = 64
    decay_layer_index: str = "engine"
    fp8_linear: bool = False  # products of attention, MLPs and experts in blockwise FP8, in training and sampling alike
    model_type: str = RING_LINEAR
    use_qk_norm: bool = True
    tie_word_embeddings: bool = False
    rope_scaling: Llama3Scaling | None = None
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    moe_router_enable_expert_bias: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    num_nextn_predict_layers: int = 0  # of the checkpoint that is read; they predict further tokens and are not loaded

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_family()
        for got, rule in (*self._attention_rules(), *self._expert_rules()):
            if not got:
                raise ValueError(f"policy config: {rule}; got {dataclasses.asdict(self)}")

    def _check_kinds(self) -> None:
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            accepted, kind = KINDS.get(field.type, ((object,), ""))
            if kind and (not isinstance(value, accepted) or isinstance(value, bool) != (field.type is bool)):
                raise ValueError(f"policy config: {field.name} must be {kind}, got {value!r}")
            if field.name in COUNTS and value < 1:
                raise ValueError(f"policy config: {field.name} must be at least 1, got {value}")

    def _check_family(self) -> None:
        family = find_family(self.model_type)
        free = {*family.carried, *family.own, "model_type"}
        for field in dataclasses.fields(self):
            value, shared = getattr(self, field.name), family.shared.get(field.name, field.default)
            if field.name not in free and value != shared:
                raise ValueError(
                    f"policy config: {field.name} = {value!r}, but every {self.model_type} policy has {shared!r}"
                )

    def _attention_rules(self) -> Iterator[Rule]:
        yield (
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads must divide num_attention_heads",
        )
        width = self.num_attention_heads * self.head_dim
        yield width % self.group_norm_size == 0, "group_norm_size must divide heads x head_dim"
        yield self.head_dim % HEAD_DIM_MULTIPLE == 0, f"head_dim must be a multiple of {HEAD_DIM_MULTIPLE}"
        turning = self.rotary_dim % 2 == 0 and 0 < self.rotary_dim <= self.head_dim
        yield turning, "head_dim x partial_rotary_factor must be even and at most head_dim"
        power = self.chunk_size >= 16 and self.chunk_size & (self.chunk_size - 1) == 0
        yield power, "chunk_size must be a power of two, at least 16"
        yield self.decay_layer_index in ("engine", "hf"), "decay_layer_index must be engine or hf"
        sizes = (self.hidden_size, 2 * self.moe_intermediate_size)
        whole = not (self.fp8_linear and self.num_experts) or not any(size % 128 for size in sizes)
        yield whole, "fp8_linear needs hidden_size and 2 x moe_intermediate_size that are multiples of 128"
        yield self.num_nextn_predict_layers >= 0, "num_nextn_predict_layers must not be negative"

    def _expert_rules(self) -> Iterator[Rule]:
        if not self.num_experts:
            return
        size = self.num_experts // self.n_group
        yield self.num_experts % self.n_group == 0, "n_group must divide num_experts"
        yield self.topk_group <= self.n_group, "topk_group must not exceed n_group"
        yield size >= 2, "an expert group needs at least 2 experts, its score is the sum of its two best"
        fits = self.num_experts_per_tok <= self.topk_group * size
        yield fits, "num_experts_per_tok exceeds the experts in the kept groups"
        yield self.num_shared_experts in (0, 1), "num_shared_experts must be 0 or 1"
        inside = all(layer in range(self.num_hidden_layers) for layer in self.mlp_only_layers)
        yield inside, "mlp_only_layers must lie within num_hidden_layers"

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def is_softmax(self, layer: int) -> bool:
        """The last layer of each group, and a tail that does not fill a group (reference code of Ring-linear)."""
        grouped = self.num_hidden_layers // self.layer_group_size * self.layer_group_size
        return (layer + 1) % self.layer_group_size == 0 or layer >= grouped

    def is_moe(self, layer: int) -> bool:
        """From first_k_dense_replace on, every decoder_sparse_step-th layer that mlp_only_layers does not name."""
        chosen = layer >= self.first_k_dense_replace and (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and chosen and layer not in self.mlp_only_layers

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
        return write_fields(dataclasses.asdict(self), dtype)

    @classmethod
    def from_hf(cls, fields: dict[str, Any]) -> "PolicyConfig":
        """Raises ValueError naming every field that is unknown or contradicts the family."""
        fields = dict(fields)
        rotary_dim = fields.pop("rotary_dim", None)
        config = cls(**read_fields(fields))
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
