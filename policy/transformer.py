"""The policy network: one forward for training, prefill and decode, with the cache passed in or absent.

A pre-norm transformer whose layers are lightning or softmax attention, dense or mixture of experts (report 2.2), for
every family of `policy.families`.
Parameters may be FP32 masters (trainer) or already in the working dtype (engine); every use rounds to the working
dtype first, so both see the same weights.

Letters: T packed tokens, D model, H heads, K key-value heads, d head dimension, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from policy.cache import CacheView
from policy.config import PolicyConfig
from policy.routing import Routing


class _Round(torch.autograd.Function):
    """Rounds an FP32 master weight to the working dtype; the gradient passes straight through to the master."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _fp32(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if not torch.is_grad_enabled():
        return weight.to(dtype).float()
    rounded: Tensor = _Round.apply(weight, dtype)
    return rounded


T = TypeVar("T")


class _Kept(Generic[T]):
    """What is made of a weight, kept until the weight changes: once per version in an engine (design A6)."""

    _made: T

    def __init__(self, make: Callable[[Tensor, torch.dtype], T]) -> None:
        self._make = make
        self._of: tuple[Tensor, int] | None = None  # holding the tensor keeps its memory from being given to another

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> T:
        if self._of is None or (self._of[0].data_ptr(), self._of[1]) != (weight.data_ptr(), weight._version):
            self._made = self._make(weight.detach(), dtype)
            self._of = weight.detach(), weight._version
        return self._made


def _quantize(weight: Tensor, dtype: torch.dtype) -> ops.Fp8Weight:
    """weight [..., K] in any dtype, rounded to `dtype` first, as where it is trained -> [rows, K]."""
    return ops.quantize_weight(weight.flatten(0, -2).to(dtype))


def _pack_for_fp32(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    return ops.pack_weight(weight, dtype, fp32_rows=True)


class Linear(nn.Module):
    """fp8: multiplied in blockwise FP8, for which the working dtype is BF16."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, fp8: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.dtype, self.fp8, self.packed = dtype, _Kept(_quantize) if fp8 else None, _Kept(ops.pack_weight)
        self.rounded = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 and not torch.is_grad_enabled():
            return ops.fp8_matmul(ops.quantize_rows(x), self.fp8(self.weight, self.dtype))
        return self.product(x, self.weight, self.rounded)

    def product(self, x: Tensor, weight: Tensor, rounded: bool = False) -> Tensor:
        """x [T, in], weight [out, in] in any dtype, rounded to the working dtype here unless it is -> [T, out]."""
        if self.fp8:
            return ops.fp8_linear(x, _fp32(weight, self.dtype))
        return ops.linear(x, weight, self.dtype, rounded, self.packed(weight, self.dtype) if rounded else None)


class RMSNorm(nn.Module):
    def __init__(self, features: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps, self.dtype, self.rounded = eps, dtype, False

    def scales(self) -> Tensor:
        """The weight as it is multiplied, FP32 [D]."""
        return self.weight if self.rounded and self.weight.dtype == torch.float32 else _fp32(self.weight, self.dtype)

    def after(self, h: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream h with a layer's output added, and its norm."""
        weight = self.scales()
        return (h, ops.rms_norm(h, weight, self.eps)) if delta is None else ops.add_rms_norm(h, delta, weight, self.eps)


class Attention(nn.Module):
    """Fused QKV, per-head norm on q and k where the family has one, RoPE, then the layer's own kind of attention."""

    def __init__(self, config: PolicyConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads(layer), config.head_dim
        width, fp8 = self.heads * self.head_dim, config.fp8_linear
        self.query_key_value = Linear(config.hidden_size, width + 2 * self.kv_heads * self.head_dim, dtype, fp8)
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
            self.key_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
        self.dense = Linear(width, config.hidden_size, dtype, fp8)
        self.layer, self.eps, self.dtype, self.normed = layer, config.rms_norm_eps, dtype, config.use_qk_norm

    def qkv(self, x: Tensor, rope: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> q [T, H, d], k and v [T, K, d]."""
        heads = self.query_key_value(x).unflatten(-1, (-1, self.head_dim))
        q_weight = self.query_layernorm.scales() if self.normed else None
        k_weight = self.key_layernorm.scales() if self.normed else None
        return ops.qk_norm_rope(heads, q_weight, k_weight, self.heads, rope, position_ids, self.eps)


class SoftmaxAttention(Attention):
    def forward(self, x: Tensor, rope: Tensor, layout: ops.ChunkLayout, cache: CacheView | None) -> Tensor:
        q, k, v = self.qkv(x, rope, layout.position_ids)
        pages = cache.softmax_layer(self.layer) if cache else None
        return self.dense(ops.softmax_attention(q, k, v, layout, pages).flatten(1))


class LightningAttention(Attention):
    """Adds the output gate: grouped RMSNorm, then sigmoid of a projection of the layer's input (report 2.2.3)."""

    def __init__(self, config: PolicyConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__(config, layer, dtype)
        width = self.heads * self.head_dim
        self.g_proj = Linear(config.hidden_size, width, dtype)
        self.g_norm = RMSNorm(width, config.rms_norm_eps, dtype)
        self.groups = config.group_norm_size
        self.decay = ops.DecayTables.build(
            torch.tensor(config.decay_slopes(layer), dtype=torch.float64), config.chunk_size
        )

    def _apply(self, move: Any, recurse: bool = True) -> "LightningAttention":
        """The tables follow the parameters to another device."""
        super()._apply(move, recurse)
        self.decay = self.decay.to(self.g_proj.weight.device)
        return self

    def forward(self, x: Tensor, rope: Tensor, layout: ops.ChunkLayout, cache: CacheView | None) -> Tensor:
        q, k, v = self.qkv(x, rope, layout.position_ids)
        states = cache.linear_layer(self.layer) if cache else None
        o = ops.lightning_attention(q, k, v, self.decay, layout, states).flatten(1)
        return self.dense(ops.grouped_rms_norm_gate(o, self.g_norm.scales(), self.g_proj(x), self.groups, self.eps))


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int, dtype: torch.dtype, fp8: bool) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * width, dtype, fp8)
        self.down = Linear(width, hidden, dtype, fp8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(ops.swiglu(self.gate_up(x)))
        return y


class MoE(nn.Module):
    """Routed experts and, where the family has one, a shared expert. expert_bias: Ring-linear's, moves choices only."""

    expert_bias: Tensor | None

    def __init__(self, config: PolicyConfig, dtype: torch.dtype) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate = Linear(hidden, experts, dtype)
        self.register_buffer("expert_bias", torch.zeros(experts) if config.moe_router_enable_expert_bias else None)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        shared = config.moe_shared_expert_intermediate_size * config.num_shared_experts
        self.shared_experts = MLP(hidden, shared, dtype, config.fp8_linear) if shared else None
        self.config, self.dtype, self.rounded = config, dtype, False
        self.fp8 = (_Kept(_quantize), _Kept(_quantize)) if config.fp8_linear else None
        self.packed = _Kept(ops.pack_weight), _Kept(ops.pack_weight)
        self.packed_gate = _Kept(_pack_for_fp32)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        c = self.config
        packed = self.packed_gate(self.gate.weight, self.dtype) if self.rounded else None
        logits = ops.fp32_linear(x, self.gate.weight, self.dtype, packed)
        ids, weights = ops.route(
            logits,
            self.expert_bias,
            c.num_experts_per_tok,
            c.n_group,
            c.topk_group,
            c.routed_scaling_factor,
            c.score_function,
            c.norm_topk_prob,
        )
        if routing is not None and (replayed := routing.meet(ids, weights)) is not None:
            ids, recorded = replayed
            weights = ops.expert_weights(logits, ids, c.routed_scaling_factor, c.score_function, c.norm_topk_prob)
            if recorded is not None:
                weights = ops.replayed_weights(weights, recorded)
        routed = self._routed(x, ids, weights)
        return routed if self.shared_experts is None else routed + self.shared_experts(x).float()

    def _routed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.fp8 is None:
            packed: tuple[Tensor | None, Tensor | None] = None, None
            if self.rounded:
                packed = self.packed[0](self.gate_up, self.dtype), self.packed[1](self.down, self.dtype)
            return ops.experts(x, self.gate_up, self.down, ids, weights, self.dtype, self.rounded, packed)
        if torch.is_grad_enabled():
            gate_up, down = (_fp32(weight, self.dtype) for weight in (self.gate_up, self.down))
            return ops.trained_fp8_experts(x, gate_up, down, ids, weights)
        quantize_gate_up, quantize_down = self.fp8
        gate_up_fp8, down_fp8 = quantize_gate_up(self.gate_up, self.dtype), quantize_down(self.down, self.dtype)
        return ops.fp8_experts(x, gate_up_fp8, down_fp8, ids, weights, self.config.num_experts)

    def num_idle_parameters(self) -> int:
        """Those of the experts that a token does not choose."""
        width = self.gate_up[0].numel() + self.down[0].numel()
        return (self.config.num_experts - self.config.num_experts_per_tok) * width


class Block(nn.Module):
    def __init__(self, config: PolicyConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        kind = SoftmaxAttention if config.is_softmax(layer) else LightningAttention
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = kind(config, layer, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp: nn.Module
        if config.is_moe(layer):
            self.mlp = MoE(config, dtype)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, dtype, config.fp8_linear)

    def forward(
        self,
        h: Tensor,
        delta: Tensor | None,
        rope: Tensor,
        layout: ops.ChunkLayout,
        cache: CacheView | None,
        routing: Routing | None,
    ) -> tuple[Tensor, Tensor]:
        """h: the FP32 residual stream [T, D] and what the layer before adds to it; the same after this layer."""
        h, x = self.input_layernorm.after(h, delta)
        h, x = self.post_attention_layernorm.after(h, self.attention(x, rope, layout, cache))
        return h, self.mlp(x, routing) if isinstance(self.mlp, MoE) else self.mlp(x)


class Policy(nn.Module):
    """config: the shape; dtype: the working dtype of weights and matrix operands, bfloat16 or float32."""

    def __init__(self, config: PolicyConfig, dtype: torch.dtype) -> None:
        super().__init__()
        if config.fp8_linear and dtype != torch.bfloat16:
            raise ValueError(
                f"fp8_linear with {dtype}: FP8 products give BF16, so the working dtype must be bfloat16; "
                "set policy.dtype=bfloat16 or leave policy.fp8_linear off"
            )
        self.config, self.dtype = config, dtype
        self.is_rounded = False  # whether the parameters hold numbers of `dtype` only, whatever type stores them
        self.word_embeddings = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Block(config, layer, dtype) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self._packed_head = _Kept(ops.pack_weight)
        head = torch.empty(config.vocab_size, config.hidden_size)
        self.lm_head = self.word_embeddings if config.tie_word_embeddings else nn.Parameter(head)
        stretch = config.rope_scaling.stretch if config.rope_scaling else None
        table = ops.rope_table(config.max_position_embeddings, config.rotary_dim, config.rope_theta, stretch)
        self.register_buffer("rope_table", table, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        layout: ops.ChunkLayout,
        cache: CacheView | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """input_ids int64 [T], packed as `layout` says -> final hidden states, FP32 [T, D].

        routing: a new one for this call, to record which experts the tokens go to, or to say which.
        """
        h = _fp32(F.embedding(input_ids, self.word_embeddings), self.dtype)
        rope = self.get_buffer("rope_table")
        delta: Tensor | None = None
        for block in self.layers:
            h, delta = block(h, delta, rope, layout, cache, routing)
        return self.norm.after(h, delta)[1]

    def packed_head(self) -> Tensor | None:
        """`ops.pack_weight` of the head, for the sampler of an engine."""
        return self._packed_head(self.lm_head, self.dtype)

    def log_probs(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """hidden [N, D], targets int64 [N] -> log-probs and entropy in nats, FP32 [N]."""
        return ops.log_probs(hidden, self.lm_head, targets, temperature, self.dtype)

    def full_log_probs(self, hidden: Tensor, temperature: float) -> Tensor:
        """hidden [N, D] -> log-probs over the vocabulary, FP32 [N, V], without gradient."""
        return ops.full_log_probs(hidden, self.lm_head, temperature, self.dtype)

    def cross_entropy(self, hidden: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
        """hidden [N, D], targets int64 [N] -> sum of row_weights FP32 [N] times -log-probs, a scalar."""
        return ops.cross_entropy(hidden, self.lm_head, targets, row_weights, self.dtype)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Matrices from Normal(0, initializer_range); those writing to the residual stream scaled by (2 layers)^-1/2,
        as in GPT-2."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                writes = name.endswith(("dense.weight", "down.weight", ".down"))
                std = self.config.initializer_range * ((2 * len(self.layers)) ** -0.5 if writes else 1.0)
                parameter.normal_(0.0, std, generator=generator)

    def to_working_dtype(self, device: torch.device | None = None) -> "Policy":
        """Drops the FP32 masters, as an engine does, and moves to `device`. On a CPU the rounded numbers of vectors are
        stored in FP32, in which they are multiplied there."""
        device = device or self.device
        for parameter in self.parameters():
            stored = torch.float32 if device.type == "cpu" and parameter.ndim == 1 else self.dtype
            parameter.data = parameter.data.to(self.dtype).to(stored)
            parameter.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, (Linear, RMSNorm, MoE)):
                module.rounded = True
        self.is_rounded = True
        return self.to(device)

    @property
    def device(self) -> torch.device:
        return self.lm_head.device

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """Those that one token meets between embeddings and head: the figure that mixtures are named by."""
        ends = {id(matrix): matrix.numel() for matrix in (self.word_embeddings, self.lm_head)}
        idle = sum(block.mlp.num_idle_parameters() for block in self.layers if isinstance(block.mlp, MoE))
        return self.num_parameters() - sum(ends.values()) - idle
