"""The faults that the tests plant: each as a careless engine or trainer makes it, written without the diagnosis."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from policy import transformer
from policy.cache import CachePools
from policy.tokenizer import load_tokenizer, render_chat
from tests.rl.diagnose.rig import PROBLEMS, Rig, run_step, sample_step, with_prompt, with_temperature
from trainer.batch import PackedBatch, TrainSample

Operator = Callable[..., Any]


def other_operator(name: str, function: Operator) -> Callable[[], AbstractContextManager[Any]]:
    """The policy's forward calls `function` under this name."""
    overlay = SimpleNamespace(**{each: getattr(ops, each) for each in dir(ops)} | {name: function})
    return lambda: patch.object(transformer, "ops", overlay)


def other_sample(draw: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], AbstractContextManager[Any]]:
    """The engine takes tokens and log-probs from `draw`: (hidden, head, tokens, log-prob rows, temperature) -> both."""
    sample = ops.sample

    def other(hidden: Tensor, weight: Tensor, temperature: Tensor, *others: Any, whole: bool = True) -> Any:
        tokens, _, rows, *rest = sample(hidden, weight, temperature, *others)
        return *draw(hidden, weight, tokens, rows, temperature), rows, *rest

    return lambda: patch.object(ops, "sample", other)


def shifted_mask(rig: Rig) -> None:
    pack = PackedBatch.pack

    def shifted(samples: Sequence[TrainSample], device: torch.device | str = "cpu") -> PackedBatch:
        batch = pack(samples, device)
        return replace(batch, response_mask=batch.response_mask.roll(-1))

    rig.trainer_patches.append(lambda: patch.object(PackedBatch, "pack", shifted))


def shifted_log_probs(rig: Rig) -> None:
    """The engine forgets that the first token comes from the prompt's last row."""
    generate = rig.engine.generate

    def shifted(requests: Any) -> Any:
        return [replace(each, log_probs=_later(each.log_probs)) for each in generate(requests)]

    rig.engine_patches.append(lambda: patch.object(rig.engine, "generate", shifted))


def _later(log_probs: Any) -> Any:
    moved = log_probs.copy()
    moved[:-1] = log_probs[1:]
    return moved


def wrong_temperature(rig: Rig) -> None:
    rig.alter = lambda request: with_temperature(request, 0.7)


def top_k_renormalised(rig: Rig) -> None:
    """The engine records log-probs among the 50 likeliest tokens, and draws nothing else."""

    def truncated(hidden: Tensor, weight: Tensor, tokens: Tensor, rows: Tensor, temperature: Tensor) -> Any:
        best = rows.topk(50, -1)
        return best.indices[:, 1], best.values.log_softmax(-1)[:, 1]

    rig.engine_patches.append(other_sample(truncated))


def stale_tensor(rig: Rig) -> None:
    """One tensor stays behind when the weights move on."""
    tensor = dict(rig.engine.policy.named_parameters())["layers.2.attention.dense.weight"].data
    old = tensor.clone()
    run_step(rig, 1)
    rig.apply()
    rig.sync_weights()
    tensor.copy_(old)


def transposed_expert(rig: Rig) -> None:
    matrix = dict(rig.engine.policy.named_parameters())["layers.1.mlp.down"].data[2]
    matrix.copy_(matrix.t().reshape(matrix.shape).clone())


def bf16_state(rig: Rig) -> None:
    def rounded(*arguments: Any) -> Tensor:
        o = ops.lightning_attention(*arguments)
        if (cache := arguments[5]) is not None:
            cache.state.copy_(cache.state.bfloat16())
        return o

    rig.engine_patches.append(other_operator("lightning_attention", rounded))


def lost_snapshot(rig: Rig) -> None:
    """The prompts are cached by an earlier step, without the states that belong to them."""
    rig.engine_patches.append(lambda: patch.object(CachePools, "keep_state", lambda pools, slot, snapshot: None))
    sample_step(rig, 1)


def lost_at_fork(rig: Rig) -> None:
    """Who shares a prompt with the group gets its open chunk, and a state of zeros."""

    def open_chunk_only(pools: CachePools, source: int, targets: list[int]) -> None:
        for state, keys, values in pools.linear.values():
            state[targets] = 0.0
            keys[targets], values[targets] = keys[source].clone(), values[source].clone()

    rig.engine_patches.append(lambda: patch.object(CachePools, "copy_slot", open_chunk_only))


def bf16_head(rig: Rig) -> None:
    def rounded(hidden: Tensor, weight: Tensor, tokens: Tensor, rows: Tensor, temperature: Tensor) -> Any:
        logits = F.linear(hidden.bfloat16(), weight.bfloat16()).float() / temperature[:, None]
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)

    rig.engine_patches.append(other_sample(rounded))


def other_eps(rig: Rig) -> None:
    for module in rig.engine.policy.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-5


def other_decay(rig: Rig) -> None:
    config = replace(rig.engine.policy.config, decay_layer_index="hf")
    for layer, block in enumerate(rig.engine.policy.layers):
        if not config.is_softmax(layer):
            slopes = torch.tensor(config.decay_slopes(layer), dtype=torch.float64)
            block.attention.decay = ops.DecayTables.build(slopes, config.chunk_size)


def unstable_top_k(rig: Rig) -> None:
    def last_of_equals(logits: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
        """Ties go to the highest index."""
        ids, weights = ops.route(logits.flip(-1), None if bias is None else bias.flip(-1), *others)
        ids = logits.shape[-1] - 1 - ids
        order = ids.argsort(-1)
        return ids.gather(1, order), weights.gather(1, order)

    rig.engine_patches.append(other_operator("route", last_of_equals))


def split_k(rig: Rig) -> None:
    target = rig.engine.policy.get_submodule("layers.2.attention.dense").weight

    def split(x: Tensor, weight: Tensor, dtype: torch.dtype, *more: Any) -> Tensor:
        if weight is not target:
            return ops.linear(x, weight, dtype, *more)
        half = x.shape[-1] // 2
        low = F.linear(x[:, :half].to(dtype), weight[:, :half].to(dtype))
        return low + F.linear(x[:, half:].to(dtype), weight[:, half:].to(dtype))

    rig.engine_patches.append(other_operator("linear", split))


def wrong_template(rig: Rig) -> None:
    """The engine encodes the bare text of the problem."""
    tokenizer = load_tokenizer(rig.base)
    rig.alter = lambda request: with_prompt(request, tokenizer(PROBLEMS[request.request_id] + "\n")["input_ids"])


def template_twice(rig: Rig) -> None:
    tokenizer = load_tokenizer(rig.base)

    def rendered(text: str) -> str:
        return render_chat([("user", text)], tokenizer)

    rig.alter = lambda request: with_prompt(
        request, tokenizer(rendered(rendered(PROBLEMS[request.request_id])), add_special_tokens=False)["input_ids"]
    )


def trainer_eps(rig: Rig) -> None:
    for module in rig.trained.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-5


def wrong_record(rig: Rig) -> None:
    """The engine writes down another number than it computed, for one token."""
    generate = rig.engine.generate

    def wrong(requests: Any) -> Any:
        first, *others = generate(requests)
        log_probs = first.log_probs.copy()
        log_probs[3] += 0.125
        return [replace(first, log_probs=log_probs), *others]

    rig.engine_patches.append(lambda: patch.object(rig.engine, "generate", wrong))


def noise(name: str, uses: int, place: int) -> Callable[[Rig], None]:
    """A fault of no known cause: of the `uses` of an operator in a forward, the one at `place` is a little off."""

    def plant(rig: Rig) -> None:
        function, calls = getattr(ops, name), itertools.count()

        def noisy(*arguments: Any) -> Tensor:
            y = function(*arguments)
            return y + 1e-3 * torch.sin(1e3 * y) if next(calls) % uses == place else y

        rig.engine_patches.append(other_operator(name, noisy))

    return plant
