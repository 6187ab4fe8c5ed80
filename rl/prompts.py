"""From problems to requests, and from completions back to text: the one place where text and tokens meet."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rl.data_columns import Row
from rl.data_config import DataConfig


@dataclass(frozen=True)
class Prompt:
    row: Row
    index: int  # of the row in its data set: the prompt's part of a random draw's address
    text: str
    token_ids: np.ndarray  # int64


def encode_prompts(rows: list[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Raises ValueError naming the rows whose prompt exceeds data.max_prompt_tokens."""
    texts = [config.prompt(row.problem) for row in rows]
    prompts = [
        Prompt(row, index, text, np.array(ids, dtype=np.int64))
        for index, (row, text, ids) in enumerate(zip(rows, texts, tokenizer(texts)["input_ids"], strict=True))
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


def completion_text(token_ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))
