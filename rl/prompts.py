"""From problems to requests, and from completions back to text: the one place where text and tokens meet."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from policy.tokenizer import render_chat
from rl.data_columns import Message, Row
from rl.data_config import DataConfig


@dataclass(frozen=True)
class Prompt:
    row: Row
    index: int  # of the row in its data set: the prompt's part of a random draw's address
    text: str
    token_ids: np.ndarray  # int64


def encode_prompts(rows: list[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Raises ValueError naming the rows whose prompt exceeds data.max_prompt_tokens, and as `encode` does."""
    prompts = [
        Prompt(row, index, text, np.array(ids, dtype=np.int64))
        for index, (row, (text, ids)) in enumerate(zip(rows, encode(rows, config, tokenizer), strict=True))
    ]
    long = [prompt for prompt in prompts if len(prompt.token_ids) > config.max_prompt_tokens]
    if long:
        named = ", ".join(f"{prompt.row.id} ({len(prompt.token_ids)} tokens)" for prompt in long[:5])
        longest = max(len(prompt.token_ids) for prompt in long)
        raise ValueError(
            f"{len(long)} of {len(prompts)} prompts exceed data.max_prompt_tokens = {config.max_prompt_tokens}: {named}"
            f"{', ...' if len(long) > 5 else ''}; set data.max_prompt_tokens={longest}, or leave those rows out"
        )
    return prompts


def encode(rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """Text and token ids of every row's prompt: the only way there is from a problem, or from messages, to tokens.

    Raises ValueError where the tokenizer lacks the chat template that `config` asks for, or the template fails.
    """
    chat = uses_chat(config, tokenizer)
    texts = [_chat_text(row, config, tokenizer) if chat else config.prompt(row.problem) for row in rows]
    # A chat template writes the special tokens itself.
    encoded = tokenizer(texts, add_special_tokens=not chat)["input_ids"] if texts else []
    return list(zip(texts, encoded, strict=True))


def encode_problem(problem: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt of one problem that is in no data set."""
    return encode([Row("the prompt", problem, "", "given")], config, tokenizer)[0][1]


def uses_chat(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts are chats. Raises ValueError where they have to be, and the tokenizer has no template."""
    if config.chat == "off":
        return False
    wanted = [f"data.{name} = {value!r}" for name, value in _chat_settings(config).items() if value is not None]
    if tokenizer.chat_template is None and wanted:
        raise ValueError(
            f"{', '.join(wanted)}: the tokenizer has no chat template; put the chat_template.jinja of the policy into "
            "its folder, or set data.chat=off without these"
        )
    return tokenizer.chat_template is not None


def _chat_settings(config: DataConfig) -> dict[str, object]:
    return {"chat": "on" if config.chat == "on" else None, "system": config.system, "thinking": config.thinking}


def _chat_text(row: Row, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    messages: tuple[Message, ...] = row.messages or (("user", config.prompt(row.problem).strip()),)
    if config.system is not None and messages[0][0] != "system":
        messages = (("system", config.system), *messages)
    try:
        return render_chat(messages, tokenizer, config.thinking)
    except ValueError as error:
        raise ValueError(f"{row.source}, row {row.id}: {error}") from error


def prompt_lengths(rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of every row's prompt."""
    return [len(ids) for _, ids in encode(rows, config, tokenizer)]


def completion_text(token_ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))
