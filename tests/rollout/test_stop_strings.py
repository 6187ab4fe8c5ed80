"""An end at a string: at the token that completes it, whatever the string is cut into."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.stop_strings import StopStrings
from tests.rollout.oracle import _is_new
from tests.rollout.tiny import text_of


def first_stop(strings: list[str], tokens: list[int], decode: Callable[[list[int]], str] = text_of) -> int | None:
    watcher = StopStrings(strings, decode)
    return next((place for place, token in enumerate(tokens) if watcher.completes(token)), None)


def letters(ids: list[int]) -> str:
    return "".join(chr(token) for token in ids)


@pytest.mark.parametrize(
    ("strings", "text", "expected"),
    [
        (["b"], "aaba", 2),
        (["ab", "a"], "xab", 1),
        (["abc"], "ab" * 30 + "abc" + "abc", 62),
        (["abc"], "ab" * 30, None),
        (["aaaa"], "a" * 9, 3),
    ],
)
def test_the_token_that_completes_a_string(strings: list[str], text: str, expected: int | None) -> None:
    assert first_stop(strings, [ord(letter) for letter in text], letters) == expected


def test_a_character_in_two_tokens_counts_when_it_is_whole() -> None:
    assert first_stop(["\u00e9"], [1, 38, 39, 2]) == 2
    assert first_stop(["b\u00e9"], [38, 39, 1, 36, 38, 39]) == 5


@given(
    st.lists(st.text("abcdef\u00e9", min_size=1, max_size=6), min_size=1, max_size=3),
    st.lists(st.integers(0, 39) | st.integers(36, 39), max_size=80),
)
def test_windows_find_what_the_whole_text_shows(strings: list[str], tokens: list[int]) -> None:
    whole = next(
        (n for n in range(len(tokens)) if any(_is_new(text, tokens[: n + 1], text_of) for text in strings)), None
    )
    assert first_stop(strings, tokens) == whole


def test_what_is_decoded_does_not_grow_with_the_text() -> None:
    longest = []

    def decode(ids: list[int]) -> str:
        longest.append(len(ids))
        return letters(ids)

    assert first_stop(["stop"], [97] * 500, decode) is None
    assert max(longest) < 40
