"""Answers in OpenAI's form, whole or as events of a stream."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rollout.request import Completion

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a part of a character is decoded to


@dataclass(frozen=True)
class Answer:
    """What all chunks of one answer share. top: likely tokens beside each sampled one, None without log-probs."""

    chat: bool
    model: str
    tokenizer: PreTrainedTokenizerBase
    top: int | None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return {**self._head(streams=False), "choices": list(choices), "usage": usage}

    def event(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head(streams=True), "choices": list(choices)}

    def usage_event(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self.event([]), "usage": usage}

    def choice(self, index: int, text: str, completion: Completion) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._choice(index, said, completion, completion.finish_reason)

    def part(self, index: int, text: str, completion: Completion, finish_reason: str | None) -> dict[str, Any]:
        """Of a stream: the text and the tokens that are new."""
        said = {"delta": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._choice(index, said, completion, finish_reason)

    def _choice(
        self, index: int, said: dict[str, Any], completion: Completion, finish_reason: str | None
    ) -> dict[str, Any]:
        log_probs = None if self.top is None else (_chat_log_probs if self.chat else _log_probs)(completion, self)
        return {"index": index, **said, "logprobs": log_probs, "finish_reason": finish_reason}

    def _head(self, streams: bool) -> dict[str, Any]:
        if self.chat:
            prefix, kind = "chatcmpl", "chat.completion.chunk" if streams else "chat.completion"
        else:
            prefix, kind = "cmpl", "text_completion"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def token_text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def tail(completion: Completion, begin: int) -> Completion:
    """The completion without its first `begin` tokens."""
    top_ids, top_log_probs = completion.top_token_ids, completion.top_log_probs
    return replace(
        completion,
        token_ids=completion.token_ids[begin:],
        log_probs=completion.log_probs[begin:],
        top_token_ids=None if top_ids is None else top_ids[begin:],
        top_log_probs=None if top_log_probs is None else top_log_probs[begin:],
    )


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _likely(completion: Completion, at: int, top: int) -> list[tuple[int, float]]:
    if not top or completion.top_token_ids is None or completion.top_log_probs is None:
        return []
    pairs = zip(completion.top_token_ids[at].tolist(), completion.top_log_probs[at].tolist(), strict=True)
    return list(pairs)[:top]


def _log_probs(completion: Completion, answer: Answer) -> dict[str, Any]:
    texts = [answer.token_text(token) for token in completion.token_ids.tolist()]
    top = [_by_text(_likely(completion, at, answer.top or 0), answer) for at in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": completion.log_probs.tolist(),
        "top_logprobs": top if answer.top else None,
        "text_offset": _offsets(texts),
    }


def _by_text(likely: Sequence[tuple[int, float]], answer: Answer) -> dict[str, float]:
    """Parts of characters look alike as text; the likeliest of them stays."""
    found: dict[str, float] = {}
    for token, value in likely:
        found.setdefault(answer.token_text(token), value)
    return found


def _offsets(texts: Sequence[str]) -> list[int]:
    offsets, length = [], 0
    for text in texts:
        offsets.append(length)
        length += len(text)
    return offsets


def _chat_log_probs(completion: Completion, answer: Answer) -> dict[str, Any]:
    def entry(token: int, value: float) -> dict[str, Any]:
        text = answer.token_text(token)
        whole = BROKEN not in text
        return {"token": text, "logprob": value, "bytes": list(text.encode()) if whole else None}

    pairs = zip(completion.token_ids.tolist(), completion.log_probs.tolist(), strict=True)
    content = [
        {
            **entry(token, value),
            "top_logprobs": [entry(*likely) for likely in _likely(completion, at, answer.top or 0)],
        }
        for at, (token, value) in enumerate(pairs)
    ]
    return {"content": content, "refusal": None}
