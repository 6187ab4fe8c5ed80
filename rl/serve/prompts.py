"""From what a client sends to a request for the engine."""

import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from policy.tokenizer import render_chat
from rl.data_config import DataConfig
from rl.export import prompt_config, read_manifest
from rl.prompts import encode_problem
from rl.serve.errors import RequestError
from rl.serve.schema import Body, ChatBody, Message
from rollout.request import Request, SamplingParams


@dataclass(frozen=True)
class Prompts:
    """folder: of the policy, whose manifest says how its prompts look. positions: of the policy."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    positions: int

    def completion_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self._refuse_endless(prompt)
            return list(self.tokenizer(prompt)["input_ids"])
        unknown = [token for token in prompt if token >= self.vocab_size]
        if unknown:
            raise RequestError(
                400, f"prompt: token id {unknown[0]}, the policy has 0 to {self.vocab_size - 1}", param="prompt"
            )
        return prompt

    def chat_ids(self, messages: list[Message]) -> list[int]:
        """Through the chat template; a policy without one takes a single question, in the prompt it was trained on."""
        texts = [message.text() for message in messages]
        self._refuse_endless(*texts)
        if self.tokenizer.chat_template is None:
            if [message.role for message in messages] != ["user"]:
                raise RequestError(
                    400, "messages: this policy has no chat template, so it takes one user message; send that, or the "
                    "whole text to /v1/completions", param="messages",
                )  # fmt: skip
            return encode_problem(texts[0], self._config, self.tokenizer)
        # "developer" is OpenAI's newer word for the same thing.
        roles = ["system" if message.role == "developer" else message.role for message in messages]
        try:
            text = render_chat(list(zip(roles, texts, strict=True)), self.tokenizer)
        except ValueError as error:
            raise RequestError(400, f"messages: {error}", param="messages") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def request(self, body: Body, ids: list[int], seed: int, index: int) -> Request:
        """index: of the prompt among those of one body; with the seed it addresses every draw of the request."""
        field = "messages" if isinstance(body, ChatBody) else "prompt"
        room = self.positions - len(ids)
        if not ids:
            raise RequestError(400, f"{field}: no token is left of it; send some text", param=field)
        if room < 1 or (body.longest() or 1) > room:
            raise RequestError(
                400, f"{field}: {len(ids)} tokens and {body.longest() or 'at least 1'} to complete exceed the policy's "
                f"{self.positions} positions; shorten one of them", param=field, code="context_length_exceeded",
            )  # fmt: skip
        longest = body.longest() or room
        if body.min_tokens > longest:
            raise RequestError(400, f"min_tokens = {body.min_tokens}: more than the {longest} allowed", "min_tokens")
        sampling = SamplingParams(
            max_new_tokens=longest,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            min_new_tokens=body.min_tokens,
            stop_strings=tuple(body.stop),
            top_log_probs=min(body.top_log_probs() or 0, self.vocab_size),
        )
        return Request(0, np.array(ids, dtype=np.int64), body.n, sampling, seed, prompt=index)

    @cached_property
    def _config(self) -> DataConfig:
        return prompt_config(read_manifest(self.folder))

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token."""
        return max(len(token) for token in self.tokenizer.get_vocab())

    def _refuse_endless(self, *texts: str) -> None:
        """A text that must be too long is not worth its encoding."""
        characters = sum(map(len, texts))
        if characters > self.positions * self._longest_token:
            raise RequestError(
                400, f"{characters} characters exceed what the policy's {self.positions} positions can hold; send a "
                "shorter text", code="context_length_exceeded",
            )  # fmt: skip


def draw_seed(given: int | None) -> int:
    """Of a request without a seed another one each time."""
    return secrets.randbits(63) if given is None else given % 2**64
