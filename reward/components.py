"""What a completion earns besides its answer: format, length, language, repetition. Linear in the completion.

Each value depends on one completion and the recipe alone, never on the others of its batch.
"""

import re
import unicodedata
from collections import Counter

from reward.config import LanguageConfig, OverlongConfig, RepetitionConfig
from reward.extract import extract_answer

# Words in the Unicode names of a script's letters; the standard library knows scripts by no other way.
SCRIPTS = {
    "latin": {"LATIN"},
    "cjk": {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "IDEOGRAPHIC"},
    "cyrillic": {"CYRILLIC"},
    "greek": {"GREEK"},
    "arabic": {"ARABIC"},
    "hebrew": {"HEBREW"},
    "devanagari": {"DEVANAGARI"},
}

_THINK_TAG = re.compile("</?think>")
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
# Scripts that write no spaces, kana and Han, give one word a character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


def format_value(
    *, completion: str, prompt: str, marker: str, answer: bool, thinking: bool, pattern: str | None
) -> float:
    """1.0 if the completion has every part that is asked for (see `FormatConfig`), else 0.0.

    A hostile pattern may take for ever; with one, this runs in a worker that can be killed.
    """
    if thinking and not closes_thinking(completion, prompt):
        return 0.0
    after_thinking = completion.rpartition("</think>")[2] if thinking else completion
    if answer and extract_answer(after_thinking, marker) is None:
        return 0.0
    return 1.0 if pattern is None or re.search(pattern, completion) else 0.0


def closes_thinking(completion: str, prompt: str) -> bool:
    """Whether <think> and </think> alternate, from the prompt on, and the completion closes the last one."""
    tags = _THINK_TAG.findall(prompt + completion)
    paired = tags == ["<think>", "</think>"] * (len(tags) // 2)
    return paired and "</think>" in completion


def overlong_value(num_tokens: int, config: OverlongConfig) -> float:
    """DAPO's soft overlong punishment (2503.14476 Eq. 13): 0 up to max - buffer, linear to -1 at max, -1 beyond."""
    beyond = num_tokens - (config.max_tokens - config.buffer_tokens)
    return -min(max(beyond, 0), config.buffer_tokens) / config.buffer_tokens


def language_value(completion: str, config: LanguageConfig) -> float:
    r"""The share of letters that are of the asked script, 0.0 to 1.0; 1.0 where there is no letter.

    Names of LaTeX commands (`\frac`) do not count; variables do.
    """
    letters = {
        character: count
        for character, count in Counter(_LATEX_COMMAND.sub("", completion)).items()
        if character.isalpha()
    }
    asked = sum(count for letter, count in letters.items() if _is_of(config.script, letter))
    return asked / sum(letters.values()) if letters else 1.0


def repetition_value(completion: str, config: RepetitionConfig) -> float:
    """-(1 - distinct / all) over the completion's n-grams of words, lower-cased; 0.0 where there are fewer than n."""
    words = _WORD.findall(completion.lower())
    ngrams = len(words) - config.ngram + 1
    if ngrams < 1:
        return 0.0
    distinct = len({tuple(words[start : start + config.ngram]) for start in range(ngrams)})
    return distinct / ngrams - 1.0


def _is_of(script: str, letter: str) -> bool:
    return not SCRIPTS[script].isdisjoint(unicodedata.name(letter, "").split())
