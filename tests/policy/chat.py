"""A tokenizer with a chat template, for every test that needs one: a byte is a token, tags are special tokens."""

from functools import cache

from transformers import PreTrainedTokenizerFast

from policy.tokenizer import train_tokenizer

# As Qwen3's: an empty thought where thinking is off.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As Ring's: roles in capitals within tags, thinking said in the system's words.
RING = (
    "{%- if messages[0].role == 'system' %}<role>SYSTEM</role>{{ messages[0].content }}\n{% else %}<role>SYSTEM</role>"
    "{% endif %}detailed thinking on<|role_end|>"
    "{%- for message in messages if message.role != 'system' %}"
    "<role>{{ 'HUMAN' if message.role == 'user' else 'ASSISTANT' }}</role>{{ message.content }}<|role_end|>"
    "{%- endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
TAGS = ["<|im_start|>", "<|im_end|>", "<role>", "</role>", "<|role_end|>"]


@cache
def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["a"], 257)
    tokenizer.add_special_tokens({"additional_special_tokens": TAGS})
    tokenizer.chat_template = template
    return tokenizer
