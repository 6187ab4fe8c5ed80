"""Problems to token ids and back."""

import numpy as np
import pytest

from policy.tokenizer import train_tokenizer
from rl.data_columns import Row
from rl.data_config import DataConfig
from rl.prompts import completion_text, encode_prompts

# A byte is a token: nothing is frequent enough in this text to be merged.
TOKENIZER = train_tokenizer(["a"], 257)
TEMPLATE = "Q: {problem}\n"


def _rows(*problems: str) -> list[Row]:
    return [Row(f"row-{number}", problem, "1", "file.jsonl") for number, problem in enumerate(problems)]


def test_template_ids_and_index() -> None:
    first, second = encode_prompts(_rows("ab", "c"), DataConfig(prompt_template=TEMPLATE), TOKENIZER)
    assert (first.text, second.text) == ("Q: ab\n", "Q: c\n")
    assert (first.index, second.index) == (0, 1)
    assert first.token_ids.dtype == np.int64 and len(first.token_ids) == 6
    assert completion_text(first.token_ids, TOKENIZER) == "Q: ab\n"


def test_a_prompt_of_just_the_limit_is_taken() -> None:
    config = DataConfig(prompt_template=TEMPLATE, max_prompt_tokens=6)
    assert len(encode_prompts(_rows("ab"), config, TOKENIZER)) == 1


def test_every_long_prompt_counts_and_the_first_five_are_named() -> None:
    config = DataConfig(prompt_template=TEMPLATE, max_prompt_tokens=6)
    with pytest.raises(ValueError) as error:
        encode_prompts(_rows("ab", "abc", *["abcd"] * 6), config, TOKENIZER)
    message = str(error.value)
    assert message.startswith("7 of 8 prompts exceed data.max_prompt_tokens = 6: row-1 (7 tokens), row-2 (8 tokens), ")
    assert "row-5 (8 tokens), ...; set data.max_prompt_tokens=8, or leave those rows out" in message
    assert "row-6" not in message and "row-0" not in message


def test_completion_text_leaves_out_the_end_of_text() -> None:
    ids = np.array([*TOKENIZER("7 é")["input_ids"], TOKENIZER.eos_token_id], dtype=np.int64)
    assert completion_text(ids, TOKENIZER) == "7 é"
