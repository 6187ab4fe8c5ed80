"""Chat templates: what they make of messages, how they are kept, and what a bad one can do."""

from pathlib import Path

import pytest

from policy.tokenizer import load_tokenizer, render_chat
from tests.policy.chat import CHATML, RING, chat_tokenizer

QUESTION = (("user", "2+2?"),)
ASKED = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_ends_where_the_assistant_speaks() -> None:
    assert render_chat(QUESTION, chat_tokenizer(CHATML)) == ASKED
    assert render_chat((("system", "Be brief."), *QUESTION), chat_tokenizer(RING)) == (
        "<role>SYSTEM</role>Be brief.\ndetailed thinking on<|role_end|><role>HUMAN</role>2+2?<|role_end|>"
        "<role>ASSISTANT</role>"
    )


def test_thinking_on_off_and_unsaid() -> None:
    tokenizer = chat_tokenizer(CHATML)
    assert render_chat(QUESTION, tokenizer, thinking=True) == ASKED
    assert render_chat(QUESTION, tokenizer, thinking=False) == ASKED + "<think>\n\n</think>\n\n"


def test_a_template_without_thinking_says_so() -> None:
    with pytest.raises(ValueError, match=r"^data\.thinking = False: the chat template does not know enable_thinking"):
        render_chat(QUESTION, chat_tokenizer(RING), thinking=False)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        (
            "{{ messages.__class__.__mro__ }}",
            "SecurityError: access to attribute '__class__' of 'list' object is unsafe",
        ),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError: "),
        ("{% for n in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ messages + 1 }}", "TypeError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[5].content }}", "UndefinedError: list object has no element 5"),
        ("{% for", "TemplateSyntaxError: "),
        ("{% include '/etc/passwd' %}", "TypeError: no loader for this environment specified"),
    ],
)
def test_a_template_that_fails_or_attacks_is_named(template: str, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        render_chat(QUESTION, chat_tokenizer(template))
    assert str(error.value).startswith(f"the chat template fails on this chat: {reason}")


def test_the_template_of_a_folder_is_kept_as_it_came(tmp_path: Path) -> None:
    chat_tokenizer(RING).save_pretrained(tmp_path / "first")
    loaded = load_tokenizer(tmp_path / "first")
    assert loaded.chat_template == RING
    loaded.save_pretrained(tmp_path / "second")
    first, second = (tmp_path / name / "chat_template.jinja" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes() == RING.encode()
