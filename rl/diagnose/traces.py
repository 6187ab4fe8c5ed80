"""What every operator of a forward returned, by name, such as `layers.3.attention.lightning_attention`.

A trainer and an engine each trace the same sequence in their own process; the first name under which the two have other
bits is where they part. An engine's trace is made of a prefill and decode steps with given tokens.
"""

import inspect
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ops
from policy.cache import CachePools, CacheView
from policy.transformer import Policy, RMSNorm
from rl.diagnose.operators import operator, replace_operators

MAX_TRACE_BYTES = 64 * 2**20  # of one trace, roughly; of a longer one the last rows are kept
ROW_WIDTHS = 16  # hidden widths that the operators of a layer return for a token, roughly
# What a forward with gradients and one without call differently, and is to be the same.
_SAME = {"fp8_matmul": "fp8_linear", "trained_fp8_experts": "fp8_experts"}
Outputs = tuple[Tensor, ...]


@dataclass
class Trace:
    """outputs: in the order of the forward, the tensors that each operator returned, one row for each token, of the
    last tokens where there are many. arguments: those of the one operator that they were asked for."""

    outputs: dict[str, Outputs] = field(default_factory=dict)
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Difference:
    """The first operator whose outputs have other bits. row: counted from the end of the sequence, -1 is the last."""

    operator: str
    row: int
    unequal: int
    elements: int
    max_abs: float
    max_rel: float  # of the largest absolute value


def first_difference(ours: Trace, theirs: Trace) -> Difference | None:
    for name, parts in ours.outputs.items():
        for mine, other in zip(parts, theirs.outputs.get(name, ()), strict=False):
            rows = min(len(mine), len(other))
            if found := _difference(name, mine[-rows:], other[-rows:]):
                return found
    return None


def _difference(name: str, mine: Tensor, other: Tensor) -> Difference | None:
    unequal = ~(mine == other)
    if not unequal.any():
        return None
    apart = (mine.double() - other.double()).abs()
    largest = float(mine.double().abs().max())
    row = int(unequal.flatten(1).any(1).nonzero()[0]) if mine.ndim > 1 else int(unequal.nonzero()[0])
    max_abs = float(apart.max())
    return Difference(name, row - len(mine), int(unequal.sum()), mine.numel(), max_abs, max_abs / (largest or 1.0))


@torch.enable_grad()
def trace_training(
    policy: Policy, token_ids: np.ndarray, prompt_length: int, temperature: float, arguments_of: str = ""
) -> Trace:
    """token_ids int64 [prompt + completion], of which the last is only predicted; one pass over all of it, as the
    trainer makes it. arguments_of: an operator's name."""
    ids, targets = _tensors(policy, token_ids, prompt_length)
    with _Recorder.attached(policy, arguments_of) as recorder:
        layout = ops.ChunkLayout.build([len(ids)], policy.config.chunk_size, device=policy.device)
        recorder.begin_pass(len(ids))
        hidden = policy(ids, layout)
        policy.log_probs(hidden[prompt_length - 1 :], targets, temperature)
    return recorder.trace()


@torch.no_grad()
def trace_decoding(policy: Policy, token_ids: np.ndarray, prompt_length: int, temperature: float) -> Trace:
    """The same as an engine makes it: the prompt first, then one token after the other from the cache."""
    ids, targets = _tensors(policy, token_ids, prompt_length)
    chunk = policy.config.chunk_size
    blocks = -(-len(token_ids) // chunk)
    pools = CachePools(policy.config, 1, blocks, policy.dtype, policy.device)
    table = torch.arange(blocks, device=policy.device).unsqueeze(0)
    view = CacheView(pools, torch.zeros(1, dtype=torch.int64, device=policy.device), table)
    pools.reset_slots([0])
    with _Recorder.attached(policy) as recorder:
        for begin, end in [(0, prompt_length), *((at, at + 1) for at in range(prompt_length, len(ids)))]:
            layout = ops.ChunkLayout.build([end - begin], chunk, [begin], policy.device)
            recorder.begin_pass(end - begin)
            hidden = policy(ids[begin:end], layout, view)
            policy.log_probs(hidden[-1:], targets[end - prompt_length : end - prompt_length + 1], temperature)
    return recorder.trace()


def _tensors(policy: Policy, token_ids: np.ndarray, prompt_length: int) -> tuple[Tensor, Tensor]:
    ids = torch.from_numpy(token_ids).to(policy.device)
    return ids[:-1], ids[prompt_length:]


class _Recorder:
    """Knows which module runs, and keeps what the operators it calls return."""

    def __init__(self, policy: Policy, arguments_of: str) -> None:
        config = policy.config
        row_bytes = 4 * ROW_WIDTHS * config.hidden_size * config.num_hidden_layers
        self._kept_rows = max(1, MAX_TRACE_BYTES // row_bytes)
        self._names = {id(module): name for name, module in policy.named_modules()}
        self._path: list[str] = []
        self._thread = threading.get_ident()
        self._rows, self._calls = 0, Counter[str]()
        self._outputs: dict[str, deque[Outputs]] = {}
        self._arguments_of, self._arguments = arguments_of, tuple[Any, ...]()

    @classmethod
    @contextmanager
    def attached(cls, policy: Policy, arguments_of: str = "") -> Iterator["_Recorder"]:
        """While the block lasts; calls of other threads pass unseen."""
        recorder = cls(policy, arguments_of)
        functions = {name: recorder._recording(name) for name in ops.__all__ if inspect.isfunction(operator(name))}
        with ExitStack() as stack:
            for module in policy.modules():
                stack.enter_context(recorder._watched(module))
            stack.enter_context(replace_operators(functions))
            yield recorder

    def begin_pass(self, rows: int) -> None:
        self._rows = rows
        self._calls.clear()

    def trace(self) -> Trace:
        outputs = {
            name: tuple(torch.cat(parts)[-self._kept_rows :].clone() for parts in zip(*calls, strict=True))
            for name, calls in self._outputs.items()
        }
        return Trace(outputs, self._arguments)

    @contextmanager
    def _watched(self, module: nn.Module) -> Iterator[None]:
        """A norm's `after` is called past `forward`, so it is watched by itself."""
        name = self._names[id(module)]
        entered = module.register_forward_pre_hook(lambda *_: self._enter(name))
        left = module.register_forward_hook(lambda *_: self._leave())
        if isinstance(module, RMSNorm):
            vars(module)["after"] = self._inside(name, module.after)
        try:
            yield
        finally:
            entered.remove()
            left.remove()
            vars(module).pop("after", None)

    def _inside(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._enter(name)
            result = method(*arguments)
            self._leave()
            return result

        return call

    def _enter(self, name: str) -> None:
        if threading.get_ident() == self._thread:
            self._path.append(name)

    def _leave(self) -> None:
        if threading.get_ident() == self._thread:
            self._path.pop()

    def _recording(self, name: str) -> Callable[..., Any]:
        function = operator(name)

        def call(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            if threading.get_ident() == self._thread:
                self._keep(name, arguments, result)
            return result

        return call

    def _keep(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Of what has a row for each token of the pass, or is the LM head's, the last rows."""
        path = (self._path[-1] if self._path else "") or "lm_head"
        place = f"{path}.{_SAME.get(name, name)}"
        self._calls[place] += 1
        if self._calls[place] > 1:
            place = f"{place}.{self._calls[place]}"
        every = [each for each in (result if isinstance(result, tuple) else (result,)) if isinstance(each, Tensor)]
        tensors = [each for each in every if each.ndim and (len(each) == self._rows or path == "lm_head")]
        if tensors:
            rows = tuple(each.detach()[-self._kept_rows :].cpu().clone() for each in tensors)
            self._outputs.setdefault(place, deque(maxlen=self._kept_rows)).append(rows)
        if place == self._arguments_of and not self._arguments:
            self._arguments = arguments
