"""Problems to token ids and back."""

from typing import Any

import numpy as np
import pytest

from policy.tokenizer import train_tokenizer
from rl.data_columns import Row
from rl.data_config import DataConfig
from rl.prompts import completion_text, encode, encode_problem, encode_prompts, prompt_lengths
from tests.policy.chat import CHATML, chat_tokenizer

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


CHAT_ROW = Row("chat", "Second?", "1", "file.jsonl", (("system", "Own."), ("user", "First?"), ("user", " Second? ")))


def _text(row: Row, template: str | None, **config: Any) -> str:
    ((text, ids),) = encode([row], DataConfig(**config), tokenizer := chat_tokenizer(template))
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    return text


def test_a_chat_template_is_used_where_there_is_one() -> None:
    (row,) = _rows("2+2?")
    asked = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert _text(row, CHATML) == _text(row, CHATML, chat="on") == asked
    assert _text(row, CHATML, chat="off") == _text(row, None) == "2+2?\n"
    thought = "<think>\n\n</think>\n\n"
    assert _text(row, CHATML, thinking=False, prompt_template="Solve: {problem}\n") == (
        asked.replace("2+2?", "Solve: 2+2?") + thought
    )
    assert _text(row, CHATML, system="Be brief.") == "<|im_start|>system\nBe brief.<|im_end|>\n" + asked


def test_tags_are_single_tokens_and_no_token_is_added() -> None:
    (row,) = _rows("2+2?")
    tokenizer = chat_tokenizer(CHATML)
    ids = encode_problem("2+2?", DataConfig(), tokenizer)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    # user, line break, 4 characters; line break; assistant, line break
    assert [ids.index(start), ids.index(end), len(ids)] == [0, 1 + 5 + 4, 11 + 1 + 1 + 10]
    applied = tokenizer.apply_chat_template([{"role": "user", "content": "2+2?"}], add_generation_prompt=True)
    assert ids == applied["input_ids"] == encode_prompts([row], DataConfig(), tokenizer)[0].token_ids.tolist()
    assert prompt_lengths([row], DataConfig(), tokenizer) == [23]


def test_messages_are_taken_as_they_are() -> None:
    turns = "system\nOwn.<|im_end|>\n<|im_start|>user\nFirst?<|im_end|>\n<|im_start|>user\n Second? <|im_end|>"
    expected = f"<|im_start|>{turns}\n<|im_start|>assistant\n"
    assert _text(CHAT_ROW, CHATML, prompt_template="Q: {problem}") == expected
    assert _text(CHAT_ROW, CHATML, system="Mine.") == expected
    assert _text(CHAT_ROW, None, prompt_template="Q: {problem}") == "Q: Second?"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"chat": "on"}, "data.chat = 'on'"),
        ({"system": "S"}, "data.system = 'S'"),
        ({"thinking": True}, "data.thinking"),
    ],
)
def test_a_chat_without_a_template_is_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="the tokenizer has no chat template; put the") as error:
        _text(CHAT_ROW, None, **config)
    assert str(error.value).startswith(named)


def test_a_failing_template_names_the_row() -> None:
    with pytest.raises(
        ValueError, match=r"^file\.jsonl, row chat: the chat template fails on this chat: .*: no systems"
    ):
        _text(CHAT_ROW, "{{ raise_exception('no systems') }}")


def test_settings_of_a_chat_need_one() -> None:
    with pytest.raises(ValueError, match="system: belongs to a chat, but chat is off"):
        DataConfig(chat="off", system="S")
