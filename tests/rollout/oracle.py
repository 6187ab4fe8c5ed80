"""A slow, obvious generator: for each token, the training forward over the sequence so far, alone."""

import numpy as np
import torch

import ops
from policy.transformer import Policy
from rollout.request import Completion, Request


@torch.no_grad()
def complete(policy: Policy, request: Request, sample: int) -> Completion:
    """What the engine must answer for one sample of a request; policy: the trainer's, with FP32 masters."""
    temperature, stops = request.sampling.temperature, policy.config.stop_token_ids
    ids: list[int] = request.prompt_ids.tolist()
    log_probs: list[float] = []
    rows: list[np.ndarray] = []
    while len(log_probs) < request.sampling.max_new_tokens and not (log_probs and ids[-1] in stops):
        layout = ops.ChunkLayout.build([len(ids)], policy.config.chunk_size)
        hidden = policy(torch.tensor(ids), layout)[-1:]
        token, log_prob = _draw(policy, hidden, request, sample, position=len(ids))
        rows.append(policy.full_log_probs(hidden, temperature or 1.0).squeeze(0).numpy())
        ids.append(token)
        log_probs.append(log_prob)
    return Completion(
        request_id=request.request_id,
        sample=sample,
        token_ids=np.array(ids[len(request.prompt_ids) :]),
        log_probs=np.array(log_probs, dtype=np.float32),
        policy_versions=np.zeros(len(log_probs), dtype=np.int64),
        finish_reason="stop" if ids[-1] in stops else "length",
        full_log_probs=np.stack(rows),
    )


def _draw(policy: Policy, hidden: torch.Tensor, request: Request, sample: int, position: int) -> tuple[int, float]:
    address = np.array([[position], [sample], [request.prompt], [request.step]], dtype=np.uint32)
    tokens, log_probs, _ = ops.sample(
        hidden,
        policy.lm_head,
        torch.tensor([request.sampling.temperature]),
        torch.tensor([request.sampling.top_p]),
        torch.tensor([request.sampling.top_k]),
        torch.zeros(1),
        ops.addressed_uniform(request.seed, address),
        policy.dtype,
    )
    return int(tokens), float(log_probs)
