"""The network written a second time: token by token, in FP64, from the report's equations.

It shares no code with `ops` or `policy`, and autograd goes through it. fields: the family's config.json.
tensors: the family's state dict, in FP64.
"""

import math
from typing import Any

import torch
from torch import Tensor


class Equations:
    def __init__(self, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.c, self.tensors = fields, tensors
        self.heads, self.dim = fields["num_attention_heads"], fields["head_dim"]

    def w(self, layer: int, name: str) -> Tensor:
        return self.tensors[f"model.layers.{layer}.{name}.weight"]

    def log_probs(self, input_ids: list[int]) -> Tensor:
        """One sequence -> log-probs of the next token after each of its tokens, FP64 [T, V]."""
        states = [[torch.zeros(self.dim, self.dim).double()] * self.heads for _ in range(self.layers)]
        memory: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.layers)]
        rows = []
        for position, token in enumerate(input_ids):
            h = self.tensors["model.word_embeddings.weight"][token]
            for layer in range(self.layers):
                x = self.norm(h, self.w(layer, "input_layernorm"))
                if self.is_softmax(layer):
                    h = h + self.softmax_attention(layer, x, position, memory[layer])
                else:
                    h = h + self.linear_attention(layer, x, position, states[layer])
                h = h + self.mlp(layer, self.norm(h, self.w(layer, "post_attention_layernorm")))
            h = self.norm(h, self.tensors["model.norm.weight"])
            rows.append(torch.log_softmax(self.tensors["lm_head.weight"] @ h, dim=0))
        return torch.stack(rows)

    @property
    def layers(self) -> int:
        return int(self.c["num_hidden_layers"])

    def is_softmax(self, layer: int) -> bool:
        group = self.c["layer_group_size"]
        return layer % group == group - 1 or layer >= self.layers - self.layers % group

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / ((x @ x) / len(x) + self.c["rms_norm_eps"]) ** 0.5

    def rotate(self, x: Tensor, position: int) -> Tensor:
        turning = int(self.dim * self.c["partial_rotary_factor"])
        half = turning // 2
        y = list(x)
        for i in range(half):
            angle = position * self.c["rope_theta"] ** (-2 * i / turning)
            y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            y[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return torch.stack(y)

    def qkv(self, layer: int, x: Tensor, position: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        vectors = list((self.w(layer, "attention.query_key_value") @ x).split(self.dim))
        keys = (len(vectors) - self.heads) // 2
        q = [self.norm(v, self.w(layer, "attention.query_layernorm")) for v in vectors[: self.heads]]
        k = [self.norm(v, self.w(layer, "attention.key_layernorm")) for v in vectors[self.heads : self.heads + keys]]
        return [self.rotate(v, position) for v in q], [self.rotate(v, position) for v in k], vectors[-keys:]

    def softmax_attention(self, layer: int, x: Tensor, position: int, memory: list[tuple[Tensor, Tensor]]) -> Tensor:
        q, k, v = self.qkv(layer, x, position)
        memory.append((torch.stack(k), torch.stack(v)))
        outputs = []
        for head in range(self.heads):
            shared = head * self.c["num_key_value_heads"] // self.heads
            scores = torch.stack([q[head] @ keys[shared] for keys, _ in memory]) / math.sqrt(self.dim)
            weights = scores.softmax(0)
            outputs.append(sum(p * values[shared] for p, (_, values) in zip(weights, memory, strict=True)))
        return self.w(layer, "attention.dense") @ torch.cat(outputs)

    def linear_attention(self, layer: int, x: Tensor, position: int, state: list[Tensor]) -> Tensor:
        q, k, v = self.qkv(layer, x, position)
        outputs = []
        for head in range(self.heads):
            state[head] = state[head] * self.decay(layer, head) + torch.outer(k[head], v[head])
            outputs.append(q[head] @ state[head] / math.sqrt(self.dim))
        groups = torch.cat(outputs).chunk(self.c["group_norm_size"])
        weights = self.w(layer, "attention.g_norm").chunk(self.c["group_norm_size"])
        normed = torch.cat([self.norm(o, weight) for o, weight in zip(groups, weights, strict=True)])
        return self.w(layer, "attention.dense") @ (normed * (self.w(layer, "attention.g_proj") @ x).sigmoid())

    def decay(self, layer: int, head: int) -> float:
        """For a number of heads that is a power of two."""
        slope = 2 ** (-8 * (head + 1) / self.heads)
        shift = {"engine": 0, "hf": 1}[self.c["lockstep"]["decay_layer_index"]]
        return math.exp(-slope * (1 - (layer - shift) / (self.layers - 1) + 1e-5))

    def swiglu(self, layer: int, name: str, x: Tensor) -> Tensor:
        gate = self.w(layer, f"{name}.gate_proj") @ x
        return self.w(layer, f"{name}.down_proj") @ (gate * gate.sigmoid() * (self.w(layer, f"{name}.up_proj") @ x))

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        if layer < self.c["first_k_dense_replace"]:
            return self.swiglu(layer, "mlp", x)
        scores = (self.w(layer, "mlp.gate") @ x).sigmoid()
        biased = scores + self.tensors[f"model.layers.{layer}.mlp.gate.expert_bias"]
        groups = biased.view(self.c["n_group"], -1)
        kept = groups.topk(2).values.sum(1).topk(self.c["topk_group"]).indices
        allowed = torch.full_like(groups, float("-inf")).index_copy(0, kept, groups[kept]).flatten()
        chosen = allowed.topk(self.c["num_experts_per_tok"]).indices.tolist()
        weights = scores[chosen] / scores[chosen].sum() * self.c["routed_scaling_factor"]
        experts = [self.swiglu(layer, f"mlp.experts.{expert}", x) for expert in chosen]
        routed = sum(weight * expert for weight, expert in zip(weights, experts, strict=True))
        return routed + self.swiglu(layer, "mlp.shared_experts", x)
