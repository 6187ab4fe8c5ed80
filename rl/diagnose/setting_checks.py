"""Settings of the network that change every layer of a kind: each is tried, and named if it explains the record."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ops
from policy.families import find_family
from policy.transformer import LightningAttention, Policy
from rl.diagnose.evidence import Evidence, gap, is_explained
from rl.diagnose.finding import Finding
from rl.diagnose.operators import operator, replace_operators
from rl.diagnose.sample import Sequence

OTHER_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 0.0, 1e-4, 1e-3)
MAX_BOUNDARIES = 32  # of a prompt, counted back from its end
Alteration = Callable[[int, list[Tensor]], Tensor]
"""(token reached, states at the chunk boundaries so far) -> the state to go on from; the last one if all is well."""


def check_decay(evidence: Evidence) -> Finding | None:
    config = evidence.policy.config
    if not evidence.base_gap or "decay_layer_index" not in find_family(config.model_type).own:
        return None
    own = config.decay_layer_index
    other = "hf" if own == "engine" else "engine"
    with _decay(evidence.policy, other):
        residual = evidence.residual(lambda place: evidence.completion(evidence.sequences[place]))
    if residual is None:
        return None
    return Finding(
        "other decay convention",
        f"the {evidence.suspect} counts layers for their decay by the {other!r} convention, the policy by {own!r}",
        "policy.decay_layer_index",
        f"set decay_layer_index={own} in the {evidence.suspect}, and in the config.json that it reads",
        {"expected": own, "found": other, "residual": residual},
    )


@contextmanager
def _decay(policy: Policy, convention: str) -> Iterator[None]:
    config = replace(policy.config, decay_layer_index=convention)
    layers = [module for module in policy.modules() if isinstance(module, LightningAttention)]
    before = [layer.decay for layer in layers]
    for layer in layers:
        slopes = torch.tensor(config.decay_slopes(layer.layer), dtype=torch.float64)
        layer.decay = ops.DecayTables.build(slopes, config.chunk_size).to(policy.device)
    try:
        yield
    finally:
        for layer, decay in zip(layers, before, strict=True):
            layer.decay = decay


def check_eps(evidence: Evidence) -> Finding | None:
    ours = evidence.policy.config.rms_norm_eps
    for eps in OTHER_EPS if evidence.base_gap else ():
        if eps == ours:
            continue
        with _eps(evidence.policy, eps):
            residual = evidence.residual(lambda place: evidence.completion(evidence.sequences[place]))
        if residual is not None:
            return Finding(
                "other RMSNorm eps",
                f"the {evidence.suspect} normalises with eps {eps:g}, the policy's config.json says {ours:g}",
                "rms_norm_eps",
                f"give the {evidence.suspect} the policy's own config.json",
                {"eps": eps, "expected": ours, "residual": residual},
            )
    return None


@contextmanager
def _eps(policy: Policy, eps: float) -> Iterator[None]:
    modules: list[Any] = [module for module in policy.modules() if hasattr(module, "eps")]
    before = [module.eps for module in modules]
    for module in modules:
        module.eps = eps
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.eps = value


def check_head(evidence: Evidence) -> Finding | None:
    """An LM head whose operands, or whose logits, are rounded to BF16."""
    for what, log_probs in (("operands", _rounded_operands), ("logits", _rounded_logits)) if evidence.base_gap else ():
        residual = evidence.residual(partial(_with_head, evidence, log_probs))
        if residual is not None:
            return Finding(
                "BF16 LM head",
                f"the {evidence.suspect} rounds the {what} of the LM head to BF16",
                "the type of the LM head",
                f"compute the {evidence.suspect}'s LM head and log-softmax in FP32",
                {"residual": residual},
            )
    return None


def _with_head(evidence: Evidence, log_probs: Callable[..., np.ndarray], place: int) -> np.ndarray:
    each, hidden = evidence.sequences[place], evidence.hidden[place]
    targets = torch.from_numpy(each.completion_ids).to(hidden.device)
    return log_probs(evidence.policy, hidden[len(each.prompt_ids) - 1 :], targets, evidence.sample.temperature)


@torch.no_grad()
def _rounded_operands(policy: Policy, hidden: Tensor, targets: Tensor, temperature: float) -> np.ndarray:
    hidden, head = hidden.bfloat16().float(), policy.lm_head.bfloat16().float()
    found: np.ndarray = ops.log_probs(hidden, head, targets, temperature, policy.dtype)[0].cpu().numpy()
    return found


@torch.no_grad()
def _rounded_logits(policy: Policy, hidden: Tensor, targets: Tensor, temperature: float) -> np.ndarray:
    logits = ops.linear(hidden, policy.lm_head, torch.bfloat16).float() / temperature
    found: np.ndarray = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1).cpu().numpy()
    return found


def check_state(evidence: Evidence) -> Finding | None:
    """A recurrent state that is kept in BF16: from the first chunk on, or from where the engine keeps it, the prompt's
    end."""
    if not evidence.base_gap or not _has_state(evidence.policy):
        return None
    for first in ("chunk", "decoding"):
        residual = evidence.residual(partial(_with_rounded_state, evidence, first == "decoding"))
        if residual is not None:
            return Finding(
                "BF16 recurrent state",
                f"the {evidence.suspect} keeps the state of its lightning layers in BF16",
                "the type of the recurrent state (in vLLM and SGLang the mamba or SSM cache dtype)",
                f"keep the {evidence.suspect}'s recurrent state in FP32",
                {"rounded_from": f"the first {first}", "residual": residual},
            )
    return None


def _with_rounded_state(evidence: Evidence, decoding_only: bool, place: int) -> np.ndarray:
    each = evidence.sequences[place]
    prompt = len(each.prompt_ids)
    first = prompt if decoding_only else 0
    attention = _chunkwise(lambda end, states: states[-1].bfloat16().float() if end >= first else states[-1], first)
    return _completion(evidence, each, attention)


def _completion(evidence: Evidence, each: Sequence, attention: Callable[..., Tensor]) -> np.ndarray:
    """Log-probs of a completion with other lightning attention, float32 [n]."""
    with replace_operators({"lightning_attention": attention}):
        hidden = evidence.hidden_states(evidence.policy, each.token_ids)
    return evidence.log_probs(evidence.policy, hidden[len(each.prompt_ids) - 1 :], each.completion_ids)


def check_snapshot(evidence: Evidence) -> Finding | None:
    """A prompt's state that was lost, or is an older one, where sequences went on from a cached prefix."""
    if not evidence.base_gap or not _has_state(evidence.policy):
        return None
    found = []
    for place in evidence.worst_first:
        observed, expected = evidence.observed[place], evidence.expected[place]
        if np.array_equal(observed, expected):
            break
        found.append(_lost_state(evidence, evidence.sequences[place], observed, expected))
        if found[-1] is None:
            return None
    token, restored = next(each for each in found if each)
    what = f"the state of token {restored}" if restored else "the zero state"
    return Finding(
        "lost prefix-cache snapshot",
        f"{len(found)} sequences went on from {what} at token {token}, instead of the state that their prompt had left",
        f"the prefix cache of the {evidence.suspect}, and how a group shares its prompt",
        "keep a snapshot of the recurrent state with every cached prefix, or compute the prefix again without one",
        {"sequences": len(found), "token": token, "state_of_token": restored},
    )


def _lost_state(
    evidence: Evidence, each: Sequence, observed: np.ndarray, expected: np.ndarray
) -> tuple[int, int] | None:
    """(token at which the state was lost, token whose state came in its place), if that explains this sequence.

    The first token of a completion may have been drawn before: by who computed the prompt.
    """
    chunk, prompt = evidence.policy.config.chunk_size, len(each.prompt_ids)
    for token, restored in _losses(prompt, chunk):
        hypothesis = _completion(evidence, each, _chunkwise(_restoring(token, restored // chunk), token))
        for drawn in (slice(None), slice(1, None)):
            base = gap([expected[drawn]], [observed[drawn]])
            if is_explained(base, gap([hypothesis[drawn]], [observed[drawn]])):
                return token, restored
    return None


def _losses(prompt: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Where a state may get lost: at the end of the prompt, or at a chunk boundary inside it; and what replaces it."""
    last = prompt // chunk
    for boundary in range(last, max(0, last - MAX_BOUNDARIES), -1):
        for token in dict.fromkeys((prompt if boundary == last else boundary * chunk, boundary * chunk)):
            for restored in dict.fromkeys((0, boundary - 1)):
                yield token, restored * chunk


def _restoring(token: int, restored: int) -> Alteration:
    return lambda end, states: states[restored] if end == token else states[-1]


def _has_state(policy: Policy) -> bool:
    return any(isinstance(module, LightningAttention) for module in policy.modules())


def _chunkwise(alter: Alteration, cut: int = 0) -> Callable[..., Tensor]:
    """Lightning attention on one sequence, piece by piece from the cache, with `alter` at chunk boundaries and at the
    token `cut`. Without alteration the bits are those of the whole."""
    attention = operator("lightning_attention")

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Any, layout: ops.ChunkLayout, cache: None) -> Tensor:
        pools, chunk = _empty_cache(q, v, layout.chunk_size), layout.chunk_size
        states, outputs = [pools.state.clone()], []
        ends = sorted({*range(chunk, len(q), chunk), len(q), cut or len(q)})
        for begin, end in pairwise([0, *ends]):
            piece = ops.ChunkLayout.build([end - begin], chunk, [begin], q.device)
            outputs.append(attention(q[begin:end], k[begin:end], v[begin:end], decay, piece, pools))
            if end % chunk == 0:
                states.append(pools.state.clone())
            states[-1] = alter(end, states).clone()
            pools.state.copy_(states[-1])
        return torch.cat(outputs)

    return run


def _empty_cache(q: Tensor, v: Tensor, chunk: int) -> ops.LightningCache:
    heads, dim = q.shape[1:]
    kept = q.new_zeros(1, heads, chunk, dim, dtype=v.dtype)
    state = q.new_zeros(1, heads, dim, dim, dtype=torch.float32)
    return ops.LightningCache(state, kept, kept.clone(), torch.zeros(1, dtype=torch.int64, device=q.device))
