"""What a policy remembers of the sequences it decodes: state slots for lightning layers, key-value blocks for softmax.

The pools only hold tensors. Who owns which slot and block is the engine's business, and arrives with each batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import ops
from policy.config import PolicyConfig


class CachePools:
    """slots: sequences remembered at once; blocks: chunk-long key-value blocks for the softmax layers; snapshots:
    states at the end of some full chunk, kept beside the slots.

    States are FP32, keys and values `dtype`.
    """

    def __init__(
        self,
        config: PolicyConfig,
        slots: int,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        snapshots: int = 0,
    ) -> None:
        heads, dim, chunk = config.num_attention_heads, config.head_dim, config.chunk_size
        state, open_chunk = (heads, dim, dim), (slots, heads, chunk, dim)
        block = (blocks, config.num_key_value_heads, chunk, dim)
        self.linear: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # state, keys, values of each lightning layer
        self.snapshots: dict[int, Tensor] = {}  # of each lightning layer
        self.softmax: dict[int, tuple[Tensor, Tensor]] = {}  # keys, values of each softmax layer
        for layer in range(config.num_hidden_layers):
            if config.is_softmax(layer):
                self.softmax[layer] = _zeros(block, dtype, device), _zeros(block, dtype, device)
            else:
                keys, values = _zeros(open_chunk, dtype, device), _zeros(open_chunk, dtype, device)
                self.linear[layer] = _zeros((slots, *state), torch.float32, device), keys, values
                self.snapshots[layer] = _zeros((snapshots, *state), torch.float32, device)

    @staticmethod
    def bytes_per_slot(config: PolicyConfig, dtype: torch.dtype) -> int:
        layers = sum(not config.is_softmax(layer) for layer in range(config.num_hidden_layers))
        row = 4 * config.head_dim + 2 * dtype.itemsize * config.chunk_size
        return layers * config.num_attention_heads * config.head_dim * row

    @staticmethod
    def bytes_per_snapshot(config: PolicyConfig) -> int:
        """0 for a policy without lightning layers."""
        layers = sum(not config.is_softmax(layer) for layer in range(config.num_hidden_layers))
        return layers * config.num_attention_heads * config.head_dim**2 * torch.float32.itemsize

    @staticmethod
    def bytes_per_block(config: PolicyConfig, dtype: torch.dtype) -> int:
        layers = sum(config.is_softmax(layer) for layer in range(config.num_hidden_layers))
        return dtype.itemsize * layers * 2 * config.num_key_value_heads * config.chunk_size * config.head_dim

    def reset_slots(self, slots: list[int]) -> None:
        """A new sequence starts from the zero state."""
        for state, _, _ in self.linear.values():
            state[slots] = 0.0

    def keep_state(self, slot: int, snapshot: int) -> None:
        for layer, (state, _, _) in self.linear.items():
            self.snapshots[layer][snapshot] = state[slot]

    def restore_state(self, snapshot: int, slot: int) -> None:
        for layer, (state, _, _) in self.linear.items():
            state[slot] = self.snapshots[layer][snapshot]

    def copy_slot(self, source: int, targets: list[int]) -> None:
        """Gives each target the state and open chunk of the source: how a group shares its prompt."""
        for pools in self.linear.values():
            for pool in pools:
                pool[targets] = pool[source].clone()

    def copy_block(self, source: int, targets: list[int]) -> None:
        for pools in self.softmax.values():
            for pool in pools:
                pool[targets] = pool[source].clone()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class CacheView:
    """The pools as one batch sees them: slots int64 [S], block_table int64 [S, blocks], where the pools are."""

    pools: CachePools
    slots: Tensor
    block_table: Tensor | np.ndarray

    def linear_layer(self, layer: int) -> ops.LightningCache:
        return ops.LightningCache(*self.pools.linear[layer], self.slots)

    def softmax_layer(self, layer: int) -> ops.PagedCache:
        key, value = self.pools.softmax[layer]
        return ops.PagedCache(key, value, self.block_table)
