"""What a request must be to run, beyond what it is by itself: refused before anything of it is computed."""

from collections.abc import Container, Sequence

from policy.config import PolicyConfig
from rollout.request import Request, SamplingParams


def check_ids(requests: Sequence[Request], unanswered: Container[int]) -> None:
    """Raises ValueError for an id that two requests have."""
    seen: set[int] = set()
    for request in requests:
        if request.request_id in seen or request.request_id in unanswered:
            raise ValueError(f"request {request.request_id}: another unanswered one has that id; give each its own")
        seen.add(request.request_id)


def check_request(request: Request, config: PolicyConfig, blocks: int, can_decode: bool) -> None:
    """blocks: all that the engine has. Raises ValueError when the request could never run."""
    name, prompt, new_tokens = f"request {request.request_id}", request.prompt_ids, request.sampling.max_new_tokens
    limit, vocab_size = config.max_position_embeddings, config.vocab_size
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(
            f"{name}: prompt token ids from {prompt.min()} to {prompt.max()}, the policy has 0 to {vocab_size - 1}"
            "; encode prompts with the policy's own tokenizer"
        )
    if len(prompt) + new_tokens > limit:
        raise ValueError(
            f"{name}: prompt {len(prompt)} + max_new_tokens {new_tokens} exceeds the policy's {limit} positions; "
            "shorten one of them"
        )
    needed = -(-(len(prompt) + new_tokens - 1) // config.chunk_size)  # the last token is not computed
    if needed > blocks:
        raise ValueError(
            f"{name}: a sample needs {needed} blocks of key-value memory, the engine has {blocks}; "
            "raise rollout.memory_mb, or lower rollout.max_batch or max_new_tokens"
        )
    _check_sampling(name, request.sampling, vocab_size, can_decode)


def _check_sampling(name: str, sampling: SamplingParams, vocab_size: int, can_decode: bool) -> None:
    if sampling.stop_strings and not can_decode:
        raise ValueError(f"{name}: stop_strings need an engine with `decode`; give it one, or use stop_token_ids")
    if max(sampling.stop_token_ids, default=0) >= vocab_size:
        raise ValueError(f"{name}: stop_token_ids {sampling.stop_token_ids}, the policy has 0 to {vocab_size - 1}")
    if sampling.top_log_probs > vocab_size:
        raise ValueError(f"{name}: top_log_probs {sampling.top_log_probs}, the policy has {vocab_size} tokens")
