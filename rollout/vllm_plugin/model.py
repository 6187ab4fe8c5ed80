"""The model classes that vLLM instantiates: its scheduler and memory, our policy.

The policy's forward is the trainer's, with vLLM's memory for its caches.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import cached_file
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec

import ops
from policy.checkpoint import read_config
from policy.config import PolicyConfig
from policy.names import check_tensors, fill, named_views
from policy.routing import Routing
from policy.transformer import MoE, Policy
from rollout.vllm_plugin.caches import Batch, KeyValueBlocks, Shapes, States, state_shapes


class LayerCaches:
    """The caches of one step, for `Policy.forward`, which asks for them in the order of its layers."""

    def __init__(self, layers: list[KeyValueBlocks | States], batches: list[Batch]) -> None:
        self._layers, self._batches = layers, batches
        self._lent: tuple[States, ops.LightningCache, Batch] | None = None

    def softmax_layer(self, layer: int) -> ops.PagedCache:
        cache = self._layers[layer]
        assert isinstance(cache, KeyValueBlocks)
        return cache.of(self._batches[layer])

    def linear_layer(self, layer: int) -> ops.LightningCache:
        self.put_back()
        cache, batch = self._layers[layer], self._batches[layer]
        assert isinstance(cache, States)
        copies = cache.of(batch)
        self._lent = cache, copies, batch
        return copies

    def put_back(self) -> None:
        """What the last lightning layer has made of its copies. Not all at the end, so that one layer's are held."""
        if self._lent:
            cache, copies, batch = self._lent
            cache.keep(copies, batch)
            self._lent = None


class SoftmaxModel(nn.Module):
    """A policy whose layers are all softmax attention.

    vLLM repacks, moves and reloads the parameters that it sees; ours stay as they are because it sees none.
    records_routes: whether `chosen` is asked for after every step.
    """

    records_routes = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        _refuse(vllm_config)
        config, dtype = policy_config(vllm_config), vllm_config.model_config.dtype
        self._outside = (_empty_policy(config, dtype),)
        kinds = [KeyValueBlocks if config.is_softmax(layer) else States for layer in range(config.num_hidden_layers)]
        self._caches = [kind(config, dtype) for kind in kinds]
        self._names = [f"{prefix}.layers.{layer}.attention".strip(".") for layer in range(len(kinds))]
        vllm_config.compilation_config.static_forward_context |= dict(zip(self._names, self._caches, strict=True))

    @property
    def policy(self) -> Policy:
        return self._outside[0]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.policy.word_embeddings)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """input_ids [T], padded with any number of tokens -> final hidden states, FP32 [T, D]."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # to measure the memory
            return self.policy(input_ids, self._layout(list(_pieces(len(input_ids), self._longest))))
        batches = [metadata[name] for name in self._names]
        layout = self._layout(batches[0].lengths, batches[0].starts)
        caches = LayerCaches(self._caches, batches)
        self._routing = Routing() if self.records_routes else None
        hidden = self.policy(input_ids[: layout.num_tokens].long(), layout, caches, self._routing)
        caches.put_back()
        return F.pad(hidden, (0, 0, 0, len(input_ids) - layout.num_tokens))

    def chosen(self) -> tuple[Tensor, Tensor]:
        """The experts of the last step, int16 [T, mixture layers, k], and their weights, FP32."""
        assert self._routing is not None
        return self._routing.chosen(), self._routing.weights()

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Log-probs FP32 [N, V] at temperature 1, which are logits too: vLLM's mode raw_logits gives them out as they
        are."""
        policy = self.policy
        return ops.full_log_probs(hidden_states, policy.lm_head, 1.0, policy.dtype, policy.packed_head())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """All tensors of the family, in any order, at start-up and in every update. Raises ValueError naming those that
        do not fit, after which the weights are a mixture."""
        views, shapes = named_views(self.policy), dict[str, torch.Size]()

        def fitting() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                shapes[name] = tensor.shape
                if name not in views or views[name].shape == tensor.shape:
                    yield name, tensor

        fill(self.policy, fitting())
        check_tensors(self.policy, shapes)
        return set(shapes)

    @property
    def _longest(self) -> int:
        return self.policy.config.max_position_embeddings

    def _layout(self, lengths: Any, starts: Any = None) -> ops.ChunkLayout:
        return ops.ChunkLayout.build(lengths, self.policy.config.chunk_size, starts, self.policy.device)


class HybridModel(SoftmaxModel):
    """A policy with lightning layers."""

    has_inner_state: ClassVar[bool] = True
    is_hybrid: ClassVar[bool] = True

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Shapes:
        return state_shapes(policy_config(vllm_config))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        kept = vllm_config.model_config.dtype
        return torch.float32, kept, kept

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: set[Any]) -> dict[Any, tuple[Any, ...]]:
        """State, keys and values go along whole where vLLM keeps a prefix."""
        return dict.fromkeys(mamba_types, (get_temporal_copy_spec,) * 3)


def policy_config(vllm_config: VllmConfig) -> PolicyConfig:
    """From config.json itself: what transformers makes of it has lost our part."""
    model = vllm_config.model_config
    file = cached_file(model.model, "config.json", revision=model.revision)
    assert file is not None, "vLLM has read it before"
    return read_config(Path(file).parent)


def _empty_policy(config: PolicyConfig, dtype: torch.dtype) -> Policy:
    """Zero weights, as an engine holds them, made on the device and in the type that are the default here."""
    policy = Policy(config, dtype)
    for parameter in policy.parameters():
        nn.init.zeros_(parameter)
    for module in policy.modules():
        if isinstance(module, MoE) and module.expert_bias is not None:
            module.expert_bias = module.expert_bias.float()
    return policy.to_working_dtype()


def _pieces(tokens: int, longest: int) -> Iterator[int]:
    for begin in range(0, tokens, longest):
        yield min(longest, tokens - begin)


def _refuse(vllm_config: VllmConfig) -> None:
    """Raises ValueError for what the policy is not built for."""
    processes, dtype = vllm_config.parallel_config.world_size, vllm_config.model_config.dtype
    if processes != 1:
        raise ValueError(f"{processes} processes for one engine: Lockstep's policy is not split; use several engines")
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype {dtype}: Lockstep's policy computes in bfloat16 or float32; pass --dtype with one")
