"""vLLM's memory as the caches of our operators.

vLLM sees two kinds of layers: those of softmax attention as full attention over blocks of keys and values, those of
lightning attention as states. A block that it hands to a sequence for one kind may have served the other kind before.

Letters: S sequences, K key-value heads, H heads, C chunk length, d head dimension.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, MambaSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

import ops
from policy.config import PolicyConfig

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Batch:
    """One step, as one kind of layer sees it."""

    lengths: np.ndarray  # [S] new tokens of each sequence
    starts: np.ndarray  # [S] position of its first new token
    blocks: Tensor  # int64 [S, blocks]; of a lightning layer [S, 1], its state


class BatchBuilder(AttentionMetadataBuilder):
    """Of vLLM's description of a step."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False) -> Batch:
        blocks = common.block_table_tensor
        if isinstance(self.kv_cache_spec, MambaSpec):
            mode = self.vllm_config.cache_config.mamba_cache_mode
            blocks = mamba_get_block_table_tensor(blocks, common.seq_lens, self.kv_cache_spec, mode)[:, :1]
        lengths = np.diff(common.query_start_loc_cpu.numpy()).astype(np.int64)
        real = np.flatnonzero(lengths)  # a step may be padded with sequences of no tokens
        starts = common.seq_lens.cpu().numpy() - lengths
        return Batch(lengths[real], starts[real], blocks[torch.from_numpy(real).to(blocks.device)].long())


class _Backend(AttentionBackend):
    """vLLM looks up here how to describe a step; the attention itself is the operators'."""

    supported_dtypes = [torch.bfloat16, torch.float32]  # noqa: RUF012

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the layers call the operators themselves")

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        return BatchBuilder


class StateBackend(_Backend):
    @staticmethod
    def get_name() -> str:
        return "LOCKSTEP_STATE"

    @classmethod
    def is_ssm(cls) -> bool:
        return True


@cache
def block_backend(chunk_size: int, kept: torch.dtype) -> type[AttentionBackend]:
    """Blocks of one chunk, in the type in which attention multiplies. vLLM's own blocks, which may be longer, are cut
    into those."""

    class BlockBackend(_Backend):
        @staticmethod
        def get_name() -> str:
            return "LOCKSTEP_BLOCKS"

        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int]:
            return [chunk_size]

        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
            return (KVCacheLayout.LBHNC,)

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            return replace(spec, dtype=kept)

    return BlockBackend


class KeyValueBlocks(AttentionLayerBase):
    """Of one softmax layer."""

    def __init__(self, config: PolicyConfig, kept: torch.dtype) -> None:
        self.heads, self.dim, self.chunk_size = config.num_key_value_heads, config.head_dim, config.chunk_size
        self.kept = kept

    def get_attn_backend(self) -> type[AttentionBackend]:
        return block_backend(self.chunk_size, self.kept)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        size = vllm_config.cache_config.block_size
        return FullAttentionSpec(block_size=size, num_kv_heads=self.heads, head_size=self.dim, dtype=self.kept)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """kv_cache [blocks, K, C, 2 d]: a block has room for a chunk of keys and one of values. We put them one behind
        the other, so that both are contiguous: keys are the even halves, values the odd ones, which is half 2 b of all
        and half 2 b of all but the first. As a pair, because vLLM would clear a single tensor, and by wrong numbers."""
        assert kv_cache.is_contiguous() and kv_cache.shape[2] == self.chunk_size
        halves = kv_cache.view(-1, self.heads, self.chunk_size, self.dim)
        self.kv_cache = halves, halves[1:]

    def of(self, batch: Batch) -> ops.PagedCache:
        return ops.PagedCache(*self.kv_cache, 2 * batch.blocks)


class States(MambaBase):
    """Of one lightning layer: per sequence the state at the last chunk boundary, and keys and values of the open chunk.
    How many rows of those count follows from the position."""

    def __init__(self, config: PolicyConfig, kept: torch.dtype) -> None:
        self.config, self.kept = config, kept

    def get_state_shape(self) -> Shapes:
        return state_shapes(self.config)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return torch.float32, self.kept, self.kept

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def of(self, batch: Batch) -> ops.LightningCache:
        """Copies of the batch's pages, one behind the other as kernels want them; `keep` puts them back. A new sequence
        begins with zeros."""
        state, keys, values = (pool[batch.blocks[:, 0]] for pool in self.kv_cache)
        new = torch.from_numpy(batch.starts == 0).to(batch.blocks.device)
        for part in (state, keys, values):
            part[new] = 0
        return ops.LightningCache(state, keys, values, torch.arange(len(new), device=new.device))

    def keep(self, copies: ops.LightningCache, batch: Batch) -> None:
        for pool, part in zip(self.kv_cache, (copies.state, copies.key, copies.value), strict=True):
            pool[batch.blocks[:, 0]] = part


def state_shapes(config: PolicyConfig) -> Shapes:
    """Of a sequence in one layer: state [H, d, d], keys and values [H, C, d]."""
    heads, dim, chunk = config.num_attention_heads, config.head_dim, config.chunk_size
    return (heads, dim, dim), (heads, chunk, dim), (heads, chunk, dim)
