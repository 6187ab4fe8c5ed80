"""Tokenizers: a small byte-level BPE made for the quickstart, the loading of any from a Hugging Face folder, chats."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
THINKING = "enable_thinking"  # as the templates of the Qwen3 and Ring families ask for it
# A template is a program: what it raises on its own account, and what its expressions can raise.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every digit a token of its own, so that arithmetic sees digits; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises ValueError when the folder has no tokenizer. Code that comes with a checkpoint is never run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; copy the tokenizer of the base policy into it")
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def render_chat(
    messages: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, thinking: bool | None = None
) -> str:
    """The text of a chat, (role, content) each, up to where the assistant speaks next; thinking None is unsaid.

    Templates come with checkpoints, so transformers runs them in a sandbox. Raises ValueError with the reason when one
    fails, or has no use for `thinking`.
    """
    if thinking is not None and THINKING not in tokenizer.get_chat_template():
        raise ValueError(
            f"data.thinking = {thinking}: the chat template does not know {THINKING}; leave data.thinking out, and "
            "say it in data.system if the policy was taught so"
        )
    chat = [{"role": role, "content": content} for role, content in messages]
    options: dict[str, Any] = {} if thinking is None else {THINKING: thinking}
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options))
    except _TEMPLATE_ERRORS as error:
        raise ValueError(f"the chat template fails on this chat: {type(error).__name__}: {error}") from error
