"""Cases of softmax attention at the widths of Ring-mini-linear: 16 heads of 128 on 4 key-value heads, blocks of 64."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ops
from benchmarks.operators.case import Arguments, Case, Rows, backward, empty

TARGETS = ("sm_80", "sm_90", "sm_100")  # tiles of 128 rows need more shared memory than a gfx942 has

H, K, D, C = 16, 4, 128, 64
TOKENS = 8192
BF16 = torch.bfloat16

QUERY_BYTES = H * D * (2 + 4)  # q and the FP32 output of a token
KEY_BYTES = K * D * 2 * 2


def _qkv(tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (empty(tokens, heads, D, dtype=BF16)(device) for heads in (H, K, K))
    return q, k, v


def _training_inputs(sequences: int) -> Callable[[torch.device], Arguments]:
    layout = [TOKENS // sequences] * sequences
    return lambda device: (*_qkv(TOKENS, device), ops.ChunkLayout.build(layout, C, device=device))


def _cached_inputs(sequences: int, new: int, start: int) -> Callable[[torch.device], Arguments]:
    """Every sequence fills its blocks, which lie scattered over the pools."""
    each = (start + new) // C

    def make(device: torch.device) -> Arguments:
        pools = (empty(sequences * each, K, C, D, dtype=BF16)(device) for _ in "kv")
        table = torch.randperm(sequences * each).view(sequences, each).int().to(device)
        layout = ops.ChunkLayout.build([new] * sequences, C, [start] * sequences, device)
        return *_qkv(sequences * new, device), layout, ops.PagedCache(*pools, table)

    return make


def _some_sequences(arguments: Arguments, which: slice) -> Arguments:
    """The call on some sequences only, all of which bring the same number of tokens."""
    q, k, v, layout, *caches = arguments
    assert isinstance(layout, ops.ChunkLayout)
    new, lengths, starts = int(layout.lengths[0]), layout.lengths[which].tolist(), layout.starts[which].tolist()
    begin, end, _ = which.indices(len(layout.lengths))
    qkv = (x[begin * new : end * new] for x in (q, k, v) if isinstance(x, Tensor))
    pages = (ops.PagedCache(c.key, c.value, c.block_table[which]) for c in caches if isinstance(c, ops.PagedCache))
    return *qkv, ops.ChunkLayout.build(lengths, C, starts, layout.device), *pages


def _cpu_training() -> Callable[..., Tensor]:
    """Sequences of one length, so that they make a batch."""

    def run(q: Tensor, k: Tensor, v: Tensor, layout: ops.ChunkLayout) -> Tensor:
        q, k, v = (x.unflatten(0, (len(layout.lengths), -1)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def _flash_training() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor, layout: ops.ChunkLayout) -> Tensor:
        q, k, v = (x.unflatten(0, (len(layout.lengths), -1)) for x in (q, k, v))
        o: Tensor = flash_attn_func(q, k, v, causal=True)
        return o

    return run


def _dense(cache: ops.PagedCache, sequences: int) -> tuple[Tensor, Tensor]:
    """Pools of the same size in the order that the other side wants, [S, positions, K, D]; what they hold is random."""
    key, value = (pool.view(sequences, -1, K, D) for pool in (cache.key, cache.value))
    return key, value


def _cpu_cached() -> Callable[..., object]:
    from torch.nn.attention.bias import causal_lower_right

    def run(q: Tensor, k: Tensor, v: Tensor, layout: ops.ChunkLayout, cache: ops.PagedCache) -> object:
        queries = q.unflatten(0, (len(layout.lengths), -1)).transpose(1, 2)
        keys, values = (x.transpose(1, 2) for x in _dense(cache, len(layout.lengths)))
        mask: Any = None if layout.is_decode else causal_lower_right(queries.shape[2], keys.shape[2])
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)

    return run


def _flash_cached() -> Callable[..., object]:
    from flash_attn import flash_attn_with_kvcache

    def run(q: Tensor, k: Tensor, v: Tensor, layout: ops.ChunkLayout, cache: ops.PagedCache) -> object:
        queries = q.unflatten(0, (len(layout.lengths), -1))
        return flash_attn_with_kvcache(queries, *_dense(cache, len(layout.lengths)), causal=True)

    return run


def _training(sequences: int) -> list[Case]:
    length = TOKENS // sequences
    inputs, shape = _training_inputs(sequences), f"T{sequences}x{length} H16 K4 d128"
    flops = sequences * 2 * H * D * length**2  # two products of length^2 / 2 pairs
    forward, both = ops.softmax_attention, backward(ops.softmax_attention)
    rows = Rows(sequences, _some_sequences, outputs=length) if sequences > 1 else None
    size = TOKENS * (QUERY_BYTES + KEY_BYTES)
    theirs = {"torch": _cpu_training, "flash_attn": _flash_training}
    theirs_both = {name: (lambda peer=peer: backward(peer())) for name, peer in theirs.items()}
    return [
        Case("softmax_attention", "forward", shape, inputs, forward, size, flops, peers=theirs, rows=rows),
        Case(
            "softmax_attention", "forward and backward", shape, inputs, both, 4 * size, 3.5 * flops, peers=theirs_both
        ),
    ]


def _cached(name: str, sequences: int, new: int, start: int) -> Case:
    context = start + new
    return Case(
        "softmax_attention", name, f"B{sequences} new {new} of {context} H16 K4 d128",
        _cached_inputs(sequences, new, start), ops.softmax_attention,
        bytes=sequences * (context * KEY_BYTES + new * (QUERY_BYTES + KEY_BYTES)),
        flops=sequences * 4 * H * D * new * (start + new / 2),
        peers={"torch": _cpu_cached, "flash_attn": _flash_cached},
        rows=Rows(sequences, _some_sequences, outputs=new) if sequences > 1 else None,
    )  # fmt: skip


CASES = [
    *_training(1),
    *_training(4),
    _cached("decode", 64, 1, 4095),
    _cached("decode", 64, 1, 32767),
    _cached("chunked prefill", 1, 1024, 7168),
]
