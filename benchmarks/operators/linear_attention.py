"""Cases of lightning attention at the widths of Ring-mini-linear: 16 heads of 128, chunks of 64."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import ops
from benchmarks.operators.case import Arguments, Case, Rows, backward, empty

H, D, C = 16, 128, 64
SEQUENCES, LENGTH = 4, 2048
TOKENS = SEQUENCES * LENGTH
CONTEXT = 4096 + C // 2  # of a decoding sequence: its open chunk is half full
SLOPES = 2.0 ** -(0.5 * torch.arange(1, H + 1, dtype=torch.float64))
BF16 = torch.bfloat16

TOKEN_BYTES = H * D * (3 * 2 + 4)  # q, k, v and the FP32 output
STATE_BYTES = H * D * D * 4
TILE_FLOPS = TOKENS * H * (4 * C * D + 4 * D * D)  # scores, values, state read and written


def _qkv(device: torch.device, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (empty(tokens, H, D, dtype=BF16)(device) for _ in "qkv")
    return q, k, v


def _training_inputs(device: torch.device) -> Arguments:
    layout = ops.ChunkLayout.build([LENGTH] * SEQUENCES, C, device=device)
    return *_qkv(device, TOKENS), ops.DecayTables.build(SLOPES, C).to(device), layout


def _cached_inputs(sequences: int, new: int, start: int) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        layout = ops.ChunkLayout.build([new] * sequences, C, [start] * sequences, device)
        state = empty(sequences, H, D, D)(device)
        keys, values = (empty(sequences, H, C, D, dtype=BF16)(device) for _ in "kv")
        cache = ops.LightningCache(state, keys, values, torch.arange(sequences, device=device))
        return *_qkv(device, sequences * new), ops.DecayTables.build(SLOPES, C).to(device), layout, cache

    return make


def _sequences(count: int, new: int, start: int = 0) -> Rows:
    """Some of the sequences alone, each with its own slot of the cache."""

    def take(arguments: Arguments, which: slice) -> Arguments:
        q, k, v, decay, layout, *cache = arguments
        tokens, chosen = slice(which.start * new, which.stop * new), which.stop - which.start
        alone = ops.ChunkLayout.build([new] * chosen, C, [start] * chosen, layout.device)
        slots = (replace(each, slots=each.slots[which]) for each in cache)
        return q[tokens], k[tokens], v[tokens], decay, alone, *slots

    return Rows(count, take, outputs=new)


def _fla_training() -> Callable[..., object]:
    from fla.ops.simple_gla import chunk_simple_gla

    def run(q: Tensor, k: Tensor, v: Tensor, decay: ops.DecayTables, layout: ops.ChunkLayout) -> Tensor:
        q, k, v = (x.view(SEQUENCES, LENGTH, H, D) for x in (q, k, v))
        o: Tensor = chunk_simple_gla(q, k, v, g_gamma=_log_decay(q))[0]
        return o

    return run


def _fla_both() -> Callable[..., object]:
    return backward(_fla_training())


def _fla_prefill() -> Callable[..., object]:
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda q, k, v, decay, layout, cache: chunk_simple_gla(
        q[None], k[None], v[None], g_gamma=_log_decay(q), initial_state=cache.state, output_final_state=True
    )


def _fla_decode() -> Callable[..., object]:
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    return lambda q, k, v, decay, layout, cache: fused_recurrent_simple_gla(
        q[:, None], k[:, None], v[:, None], g_gamma=_log_decay(q), initial_state=cache.state, output_final_state=True
    )


def _log_decay(x: Tensor) -> Tensor:
    return -SLOPES.to(x.device, torch.float32)


def _decode(sequences: int) -> Case:
    open_rows = 2 * (CONTEXT % C) * H * D * 2
    return Case(
        "linear_attention", "decode", f"B{sequences} H16 d128 C64", _cached_inputs(sequences, 1, CONTEXT),
        ops.lightning_attention, bytes=sequences * (TOKEN_BYTES + STATE_BYTES + open_rows), peers={"fla": _fla_decode},
        rows=_sequences(sequences, 1, CONTEXT),
    )  # fmt: skip


CASES = [
    Case(
        "linear_attention", "forward", "T4x2048 H16 d128 C64", _training_inputs, ops.lightning_attention,
        bytes=TOKENS * TOKEN_BYTES, flops=TILE_FLOPS, peers={"fla": _fla_training}, rows=_sequences(SEQUENCES, LENGTH),
    ),
    Case(
        "linear_attention", "forward and backward", "T4x2048 H16 d128 C64", _training_inputs,
        backward(ops.lightning_attention), bytes=3 * TOKENS * TOKEN_BYTES, flops=3 * TILE_FLOPS,
        peers={"fla": _fla_both},
    ),
    Case(
        "linear_attention", "prefill", "T1x8192 H16 d128 C64", _cached_inputs(1, TOKENS, 0), ops.lightning_attention,
        bytes=TOKENS * TOKEN_BYTES + 2 * STATE_BYTES, flops=TILE_FLOPS, peers={"fla": _fla_prefill},
    ),
    _decode(64),
    _decode(256),
]  # fmt: skip
