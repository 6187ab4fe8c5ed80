"""Requests on their way to SGLang, one for each sample, and its answers on their way back."""

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from policy.config import PolicyConfig
from rollout.request import Completion, Request
from rollout.sample_seed import sample_seed
from rollout.sglang_engine.routes import routed_experts, unknown_experts

ALL_TOKENS = -1
MASKED_TOP_K = range(2, 4097)  # for which SGLang reports log-probs after the limits
Position = tuple[FiniteFloat, int, Any]  # log-prob, token id, text


class Finish(BaseModel):
    type: Literal["stop", "length", "abort"]
    message: str = ""


class Span(BaseModel):
    """Output tokens start to end - 1, drawn with these weights."""

    version: str
    start: Annotated[int, Field(ge=0)]
    end: int


class MetaInfo(BaseModel):
    finish_reason: Finish
    output_token_logprobs: list[Position] = []
    weight_versions: list[Span] = []
    output_top_logprobs: list[list[Position]] = []
    output_token_ids_logprobs: list[list[Position]] = []
    output_token_sampling_logprobs: list[FiniteFloat] = []
    routed_experts: str | None = None


class Answer(BaseModel):
    output_ids: list[int]
    meta_info: MetaInfo


def sample_body(
    request: Request, sample: int, name: str, cache_salt: str, stop_token_ids: tuple[int, ...], vocab_size: int
) -> dict[str, Any]:
    """The body for /generate.

    cache_salt: cached prefixes are shared only between requests of the same one. stop_token_ids: the policy's own.
    The seed is heeded by a server with --enable-deterministic-inference, which no CPU has; others draw as they like.
    """
    wanted = request.sampling
    body: dict[str, Any] = {
        "rid": name,
        "input_ids": request.prompt_ids.tolist(),
        "extra_key": cache_salt,
        "return_logprob": True,
        "sampling_params": {
            "max_new_tokens": wanted.max_new_tokens,
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "top_k": wanted.top_k or ALL_TOKENS,
            "min_p": wanted.min_p,
            "stop_token_ids": [*stop_token_ids, *wanted.stop_token_ids],
            "stop": list(wanted.stop_strings),
            "sampling_seed": sample_seed(request, sample),
        },
    }
    if wanted.top_log_probs:
        body["top_logprobs_num"] = wanted.top_log_probs
    if sample in request.full_vocab_samples:
        body["token_ids_logprob"] = list(range(vocab_size))
    if _asks_limited(request):
        body |= {"return_sampling_mask": True, "sampling_logprobs_mode": "selected"}
    return body


def refuse_unserved_sampling(request: Request) -> None:
    """Raises ValueError for what SGLang cannot do, or would give other log-probs for than the contract has."""
    wanted, name = request.sampling, f"request {request.request_id}"
    if wanted.min_new_tokens:
        raise ValueError(
            f"{name}: min_new_tokens = {wanted.min_new_tokens}, but SGLang's log-probs are then of what is left "
            "without stop tokens; set it to 0"
        )
    if _asks_limited(request) and wanted.top_k not in MASKED_TOP_K:
        raise ValueError(
            f"{name}: processed_log_probs with top_k = {wanted.top_k}, but SGLang has them only for top_k from "
            f"{MASKED_TOP_K.start} to {MASKED_TOP_K.stop - 1}; set top_k"
        )


def _asks_limited(request: Request) -> bool:
    wanted = request.sampling
    limited = wanted.top_k > 0 or wanted.top_p < 1 or wanted.min_p > 0
    return wanted.processed_log_probs and limited and wanted.temperature > 0


def completion_of(
    request: Request, sample: int, content: dict[str, Any], recorded: PolicyConfig | None = None
) -> Completion:
    """recorded: the policy whose experts were asked for. Raises ValueError when the answer is none to the request, or
    was ended by the server for its own reasons."""
    name = f"request {request.request_id}, sample {sample}"
    try:
        answer = Answer.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{name}: SGLang's answer has {where}: {first['msg']} (got {first['input']!r:.200})") from None
    meta, token_ids = answer.meta_info, answer.output_ids
    finish_reason = meta.finish_reason.type
    if not token_ids and finish_reason == "abort":
        return Completion.unstarted(request, sample)
    _check(name, request, answer)
    wanted, log_probs = request.sampling, np.array([each[0] for each in meta.output_token_logprobs], np.float32)
    top, full = _table(meta.output_top_logprobs), _table(meta.output_token_ids_logprobs)
    return Completion(
        request_id=request.request_id,
        sample=sample,
        token_ids=np.array(token_ids, dtype=np.int64),
        log_probs=log_probs,
        policy_versions=_policy_versions(name, meta.weight_versions, len(token_ids)),
        finish_reason=finish_reason,
        full_log_probs=full[0] if sample in request.full_vocab_samples else None,
        processed_log_probs=_processed(request, meta, log_probs),
        top_token_ids=top[1] if wanted.top_log_probs else None,
        top_log_probs=top[0] if wanted.top_log_probs else None,
        routed_experts=None if recorded is None else _experts(name, request, answer, recorded),
    )


def _experts(name: str, request: Request, answer: Answer, config: PolicyConfig) -> np.ndarray:
    """int16 [tokens - 1, mixture layers, k]; of an aborted sample unknown where SGLang says nothing."""
    tokens, encoded = len(request.prompt_ids) + len(answer.output_ids) - 1, answer.meta_info.routed_experts
    if encoded is None and answer.meta_info.finish_reason.type == "abort":
        return unknown_experts(tokens, config)
    try:
        return routed_experts(encoded, tokens, config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; set rollout.routing_replay=none") from None


def _check(name: str, request: Request, answer: Answer) -> None:
    token_ids, meta = answer.output_ids, answer.meta_info
    drawn = [token_id for _, token_id, _ in meta.output_token_logprobs]
    if drawn != token_ids:
        raise ValueError(
            f"{name}: SGLang's log-probs are of other tokens ({drawn[:8]}...) than its output ({token_ids[:8]}...)"
        )
    wanted = request.sampling.max_new_tokens
    if len(token_ids) > wanted or (meta.finish_reason.type == "length" and len(token_ids) < wanted):
        raise ValueError(f"{name}: SGLang gave {len(token_ids)} tokens of max_new_tokens {wanted}")


def _policy_versions(name: str, spans: list[Span], length: int) -> np.ndarray:
    """int64 [length], from spans that must cover it without a gap."""
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != length or ends != sorted(ends):
        raise ValueError(f"{name}: SGLang's weight versions do not cover its {length} tokens: {spans}")
    try:
        versions = [int(span.version) for span in spans]
    except ValueError:
        raise ValueError(f"{name}: SGLang drew with weights that are not ours: {spans}") from None
    return np.repeat(np.array(versions, dtype=np.int64), np.diff(ends))


def _processed(request: Request, meta: MetaInfo, log_probs: np.ndarray) -> np.ndarray | None:
    if not request.sampling.processed_log_probs:
        return None
    if request.sampling.temperature == 0:
        return np.zeros_like(log_probs)
    return np.array(meta.output_token_sampling_logprobs, np.float32) if _asks_limited(request) else log_probs


def _table(rows: list[list[Position]]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs, float32, and token ids, int64, of every position: [n, k] each."""
    return (
        np.array([[log_prob for log_prob, _, _ in row] for row in rows], dtype=np.float32),
        np.array([[token_id for _, token_id, _ in row] for row in rows], dtype=np.int64),
    )
