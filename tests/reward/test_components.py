"""What is rewarded besides a correct answer, against values worked out by hand."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.components import closes_thinking, format_value, language_value, overlong_value, repetition_value
from reward.config import LanguageConfig, OverlongConfig, RepetitionConfig

DAPO = OverlongConfig(max_tokens=20480, buffer_tokens=4096)


def formatted(
    completion: str, prompt: str = "", answer: bool = False, thinking: bool = False, pattern: str | None = None
) -> float:
    return format_value(
        completion=completion, prompt=prompt, marker="\\boxed", answer=answer, thinking=thinking, pattern=pattern
    )


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("so \\boxed{7}", 1.0), ("so 7", 0.0), ("so \\boxed{7", 0.0), ("\\boxed{ }", 0.0), ("", 0.0)],
)
def test_an_answer_has_to_stand_where_the_marker_says(completion: str, expected: float) -> None:
    assert formatted(completion, answer=True) == expected


@pytest.mark.parametrize(
    ("prompt", "completion", "closed"),
    [
        ("", "<think>so</think> 7", True),
        ("<think>\n", "so</think> 7", True),  # as chat templates open it
        ("<think>\n", "so", False),
        ("<think>\n", "<think>so</think>", False),
        ("", "so</think> 7", False),
        ("", "<think>so", False),
        ("", "7", False),
        ("<think>as here</think>\n", "7", False),
        ("<think>as here</think>\n", "<think>so</think> 7", True),
        ("", "<think>a</think> b <think>c</think>", True),
        ("", "<think>a<think>b</think></think>", False),
        ("", "</think><think>", False),
    ],
)
def test_thinking_is_closed_by_the_completion(prompt: str, completion: str, closed: bool) -> None:
    assert closes_thinking(completion, prompt) == closed
    assert formatted(completion, prompt, thinking=True) == float(closed)


def test_an_answer_within_the_thinking_is_no_answer() -> None:
    assert formatted("<think>\\boxed{7}</think> seven", answer=True, thinking=True) == 0.0
    assert formatted("<think>\\boxed{7}</think> \\boxed{8}", answer=True, thinking=True) == 1.0
    assert formatted("<think>\\boxed{7}</think> seven", answer=True) == 1.0


def test_a_pattern_has_to_match_somewhere() -> None:
    assert formatted("Step 1: add.\nStep 2: box.", pattern=r"(?m)^Step 2") == 1.0
    assert formatted("Step 1: add.", pattern=r"(?m)^Step 2") == 0.0
    assert formatted("Step 2: add. \\boxed{7", pattern="Step 2", answer=True) == 0.0


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20479, -4095 / 4096), (20480, -1.0), (99999, -1.0)],
)
def test_overlong_by_hand(num_tokens: int, expected: float) -> None:
    """DAPO's numbers: 16,384 tokens are free, the next 4,096 cost up to 1."""
    assert overlong_value(num_tokens, DAPO) == expected


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 500))
def test_overlong_never_rises_and_stays_within_its_range(buffer: int, free: int, num_tokens: int) -> None:
    config = OverlongConfig(max_tokens=buffer + free, buffer_tokens=buffer)
    value, longer = overlong_value(num_tokens, config), overlong_value(num_tokens + 1, config)
    assert -1.0 <= longer <= value <= 0.0
    assert (value == 0.0) == (num_tokens <= free) and (value == -1.0) == (num_tokens >= buffer + free)


@pytest.mark.parametrize(
    ("script", "completion", "expected"),
    [
        ("latin", "So it is seven.", 1.0),
        ("latin", "所以 is 七", 2 / 5),
        ("cjk", "所以 is 七", 3 / 5),
        ("cjk", "所以 \\frac{1}{2} \\boxed{七}", 1.0),  # the names of commands are not letters of the text
        ("cjk", "ひらがなカタカナ한글々", 1.0),
        ("latin", "Größe, cœur, \uff38", 1.0),  # the last is a wide X
        ("cyrillic", "ответ: x", 5 / 6),
        ("greek", "απ\\alpha", 1.0),
        ("arabic", "جواب", 1.0),
        ("hebrew", "תשובה", 1.0),
        ("devanagari", "उतर", 1.0),
        ("latin", "1 + 2 = 3", 1.0),
        ("latin", "", 1.0),
        ("latin", "\ud800\x00\u200b", 1.0),
    ],
)
def test_language_by_hand(script: str, completion: str, expected: float) -> None:
    config = LanguageConfig.model_validate({"script": script})
    assert language_value(completion, config) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("ngram", "completion", "expected"),
    [
        (1, "a b a c", -1 / 4),  # three distinct words of four
        (2, "so so so so", -2 / 3),  # one distinct pair of three
        (2, "So so SO so", -2 / 3),
        (2, "a b c d", 0.0),
        (3, "a b", 0.0),
        (1, "", 0.0),
        (2, "三加四等于七三加四", -2 / 8),  # a character is a word: `三加` and `加四` occur twice
        (20, "wait " * 119, -99 / 100),
    ],
)
def test_repetition_by_hand(ngram: int, completion: str, expected: float) -> None:
    assert repetition_value(completion, RepetitionConfig(ngram=ngram)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("unit", ["\\", "<think>", "</think>", "\\boxed{", "a ", "{", "\\(", "七", "\u0301"])
def test_no_component_takes_long_on_a_megabyte(unit: str) -> None:
    """Whatever is quadratic takes hours here. The limit is wide, as the machine may be busy."""
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    formatted(text, text, answer=True, thinking=True)
    language_value(text, LanguageConfig())
    repetition_value(text, RepetitionConfig())
    assert time.process_time() - start < 10.0
