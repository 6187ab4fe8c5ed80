"""The tokenizer made for the quickstart: any text goes through, digits stay digits, and transformers can load it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from policy.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

TEXTS = ["What is 12 + 34? The answer is 46.", "What is 7 * 8? The answer is 56."] * 20


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=300)


@given(text=st.text(max_size=60))
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["", " ", "  two  spaces .", "don 't , ok ?", "\n\n\t", "π ≈ 3,14 🎉", "\x00\u200b"])
def test_awkward_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer.encode("46")] == ["4", "6"]
    for number in ("0", "12", "20251119"):
        assert len(tokenizer.encode(number)) == len(number)


def test_words_of_the_training_text_are_merged(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 300
    assert len(tokenizer.encode(" answer")) == 1


def test_end_of_text_ends_and_pads(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.encode(END_OF_TEXT)[0]
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""


def test_training_is_repeatable(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(TEXTS, vocab_size=300)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_saved_tokenizer_is_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    text = "What is 12 + 99?  Ünïcode\n"
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert (loaded.eos_token, loaded.pad_token) == (END_OF_TEXT, END_OF_TEXT)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; copy the tokenizer of the base policy"):
        load_tokenizer(tmp_path)
