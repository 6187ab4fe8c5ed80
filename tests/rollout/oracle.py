"""A slow, obvious generator: for each token, the training forward over the sequence so far, alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import torch

import ops
from policy.transformer import Policy
from rollout.request import Completion, Request

Decode = Callable[[list[int]], str]


def complete(
    policies: Mapping[int, Policy],
    request: Request,
    sample: int,
    versions: Sequence[int],
    decode: Decode | None = None,
) -> Completion:
    """What the engine must answer for one sample of a request, if token i was drawn under versions[i], and those after
    the last under the last; policies: the trainer's, with FP32 masters."""
    sampling, prompt = request.sampling, request.prompt_ids.tolist()
    ids, steps, used = list(prompt), [], []
    reason = ""
    while not reason:
        used.append(versions[min(len(used), len(versions) - 1)])
        steps.append(_draw(policies[used[-1]], tuple(ids), request, sample))
        ids.append(steps[-1]["token"])
        reason = _end(ids[len(prompt) :], request, policies[used[-1]].config.stop_token_ids, decode)
    rows = np.stack([step["row"] for step in steps])
    order = np.argsort(-rows, axis=1, kind="stable")[:, : sampling.top_log_probs]
    return Completion(
        request_id=request.request_id,
        sample=sample,
        token_ids=np.array(ids[len(prompt) :]),
        log_probs=np.array([step["log_prob"] for step in steps], dtype=np.float32),
        policy_versions=np.array(used),
        finish_reason=reason,
        full_log_probs=rows,
        processed_log_probs=np.array([step["processed"] for step in steps], dtype=np.float32),
        top_token_ids=order,
        top_log_probs=np.take_along_axis(rows, order, 1),
    )


def _end(tokens: list[int], request: Request, policy_stops: tuple[int, ...], decode: Decode | None) -> str:
    sampling = request.sampling
    if len(tokens) > sampling.min_new_tokens:
        if tokens[-1] in (*policy_stops, *sampling.stop_token_ids):
            return "stop"
        if decode and any(_is_new(text, tokens, decode) for text in sampling.stop_strings):
            return "stop"
    return "length" if len(tokens) == sampling.max_new_tokens else ""


def _is_new(text: str, tokens: list[int], decode: Decode) -> bool:
    """Does the last token complete an occurrence of the text? The beginning of a character is none yet."""
    before = decode(tokens[:-1]).rstrip("\ufffd")
    return decode(tokens).find(text, max(0, len(before) - len(text) + 1)) >= 0


@torch.no_grad()
def _draw(policy: Policy, ids: tuple[int, ...], request: Request, sample: int) -> dict:
    sampling, stops = request.sampling, policy.config.stop_token_ids + request.sampling.stop_token_ids
    address = np.array([[len(ids)], [sample], [request.prompt], [request.step]], dtype=np.uint32)
    too_early = len(ids) - len(request.prompt_ids) < sampling.min_new_tokens
    token, log_prob, row, processed = ops.sample(
        last_hidden(policy, ids),
        policy.lm_head,
        torch.tensor([sampling.temperature]),
        torch.tensor([sampling.top_p]),
        torch.tensor([sampling.top_k]),
        torch.tensor([sampling.min_p]),
        ops.addressed_uniform(request.seed, address),
        policy.dtype,
        torch.tensor([stops]) if too_early else None,
    )
    return {"token": int(token), "log_prob": float(log_prob), "row": row[0].numpy(), "processed": float(processed)}


@cache
def last_hidden(policy: Policy, ids: tuple[int, ...]) -> torch.Tensor:
    """[1, D], remembered: many schedules ask for the same."""
    with torch.no_grad():
        layout = ops.ChunkLayout.build([len(ids)], policy.config.chunk_size)
        return policy(torch.tensor(ids), layout)[-1:]
