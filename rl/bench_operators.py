"""Single operators that have a fast form, at the shapes of a policy: in a decode step, and forward and backward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import ops
from policy.config import PolicyConfig


@dataclass(frozen=True)
class Shapes:
    """sequences: decoded at once, each `context` tokens long already. tokens: of a packed micro-batch of such."""

    sequences: int
    context: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.context


@dataclass(frozen=True)
class OperatorCall:
    """operator: its name in `ops.FAST_FORMS`. what: the kind of call and its shape."""

    operator: str
    what: str
    run: Callable[[], object]


def operator_calls(
    config: PolicyConfig, dtype: torch.dtype, device: torch.device, shapes: Shapes
) -> Iterator[OperatorCall]:
    """One at a time, as the inputs of all of them need not fit."""
    layers = range(config.num_hidden_layers)
    softmax = next((layer for layer in layers if config.is_softmax(layer)), None)
    lightning = next((layer for layer in layers if not config.is_softmax(layer)), None)
    yield from _linear(config, dtype, device, shapes)
    yield from _rms_norm(config, device, shapes)
    if softmax is not None:
        yield from _softmax(config, softmax, dtype, device, shapes)
    if lightning is not None:
        yield _lightning(config, lightning, dtype, device, shapes)


def _linear(config: PolicyConfig, dtype: torch.dtype, device: torch.device, shapes: Shapes) -> Iterator[OperatorCall]:
    width = config.num_attention_heads * config.head_dim
    for what, rows, trained in (("decode", shapes.sequences, False), ("training", shapes.tokens, True)):
        x = torch.randn(rows, width, device=device, requires_grad=trained)
        weight = torch.randn(config.hidden_size, width, device=device, requires_grad=trained)
        weight = weight if trained else weight.to(dtype)

        def run(x: Tensor = x, weight: Tensor = weight) -> None:
            _backward(ops.linear(x, weight, dtype))

        yield OperatorCall("linear", f"{what}, {rows} x {width} to {config.hidden_size}", run)


def _rms_norm(config: PolicyConfig, device: torch.device, shapes: Shapes) -> Iterator[OperatorCall]:
    for what, rows, trained in (("decode", shapes.sequences, False), ("training", shapes.tokens, True)):
        x = torch.randn(rows, config.hidden_size, device=device, requires_grad=trained)
        weight = torch.ones(config.hidden_size, device=device, requires_grad=trained)

        def run(x: Tensor = x, weight: Tensor = weight) -> None:
            _backward(ops.rms_norm(x, weight, config.rms_norm_eps))

        yield OperatorCall("rms_norm", f"{what}, {rows} x {config.hidden_size}", run)


def _softmax(
    config: PolicyConfig, layer: int, dtype: torch.dtype, device: torch.device, shapes: Shapes
) -> Iterator[OperatorCall]:
    heads, kv_heads, chunk = config.num_attention_heads, config.kv_heads(layer), config.chunk_size
    blocks = shapes.context // chunk + 1
    pool = (shapes.sequences * blocks, kv_heads, chunk, config.head_dim)
    keys, values = (torch.randn(pool, device=device).to(dtype) for _ in "kv")
    table = torch.arange(shapes.sequences * blocks, dtype=torch.int32, device=device).view(shapes.sequences, blocks)
    decode = ops.ChunkLayout.build([1] * shapes.sequences, chunk, [shapes.context] * shapes.sequences, device)
    one = _qkv(shapes.sequences, (heads, kv_heads, kv_heads), config.head_dim, dtype, device)
    size = f"{heads} heads of {config.head_dim} on {kv_heads}"

    def step() -> None:
        ops.softmax_attention(*one, decode, ops.PagedCache(keys, values, table))

    yield OperatorCall("softmax_attention", f"decode, {shapes.sequences} sequences, {size}", step)
    packed = ops.ChunkLayout.build([shapes.context] * shapes.sequences, chunk, device=device)
    all_ = _qkv(shapes.tokens, (heads, kv_heads, kv_heads), config.head_dim, dtype, device, trained=True)
    yield OperatorCall(
        "softmax_attention",
        f"training, {shapes.tokens} tokens, {size}",
        lambda: _backward(ops.softmax_attention(*all_, packed)),
    )


def _lightning(
    config: PolicyConfig, layer: int, dtype: torch.dtype, device: torch.device, shapes: Shapes
) -> OperatorCall:
    """In training there is one form only."""
    heads, dim, chunk, count = config.num_attention_heads, config.head_dim, config.chunk_size, shapes.sequences
    slopes = torch.tensor(config.decay_slopes(layer), dtype=torch.float64)
    decay = ops.DecayTables.build(slopes, chunk).to(device)
    state = torch.randn(count, heads, dim, dim, device=device)
    keys, values = (torch.randn(count, heads, chunk, dim, device=device).to(dtype) for _ in "kv")
    cache = ops.LightningCache(state, keys, values, torch.arange(count, device=device))
    # The last place of a chunk would fold it into the state at every call.
    layout = ops.ChunkLayout.build([1] * count, chunk, [shapes.context // chunk * chunk + chunk // 2] * count, device)
    qkv = _qkv(count, (heads, heads, heads), dim, dtype, device)
    what = f"decode, {count} sequences, {heads} heads of {dim}"
    return OperatorCall("lightning_attention", what, lambda: ops.lightning_attention(*qkv, decay, layout, cache))


def _qkv(
    tokens: int, heads: tuple[int, int, int], dim: int, dtype: torch.dtype, device: torch.device, trained: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(tokens, count, dim, device=device).to(dtype).requires_grad_(trained) for count in heads)
    return q, k, v


def _backward(y: Tensor) -> None:
    if y.requires_grad:
        y.sum().backward()
