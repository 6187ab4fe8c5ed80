"""Answer extraction: literal cases, properties, and hostile input that must cost linear time."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.extract import extract_answer

BOXED = "\\boxed"
MEGA = 1_000_000


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{73}", "73"),
        (r"\boxed{1} then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {5}", "5"),
        ("\\boxed\n{ 5 }", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{[0, 1\}}", r"[0, 1\}"),
        (r"\boxed{a\\}b}", r"a\\"),
        (r"\boxed{5} as \boxed asks", "5"),
        (r"\boxed{5} \boxedword{6}", "5"),
        ("the answer is 5", None),
        ("", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed{5", None),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{5\}", None),
        (r"\fbox{7}", "7"),
        (r"\boxed{7} \fbox{8}", "8"),
        (r"\fbox{7} \boxed{8}", "8"),
        (r"\boxed 7", "7"),
        (r"\boxed7", "7"),
        (r"$\boxed -73$.", "-73"),
        (r"\(\boxed 1,234.5\)", "1,234.5"),
        (r"\boxed{5} so \boxed 7", "7"),
        (r"\boxed 7x", None),
        (r"\boxed 7\frac12", None),
        (r"\boxed 7^2", None),
        (r"\boxed{5} not \boxed 7x", "5"),
        (r"\boxed x", None),
        (r"\boxed \frac12", None),
        (r"\framebox{7}", None),
    ],
)
def test_boxed(completion: str, answer: str | None) -> None:
    assert extract_answer(completion, BOXED) == answer


@pytest.mark.parametrize(
    ("completion", "marker", "answer"),
    [
        ("work\n#### 73", "####", "73"),
        ("#### 1\n#### 2\nbye", "####", "2"),
        ("Answer: 3\r\n", "Answer:", "3"),
        ("**Answer:** 3", "Answer:", "** 3"),
        ("Answer:\n3", "Answer:", None),
        ("answer: 3", "Answer:", None),
        ("Answer: \\frac{1}{2", "Answer:", "\\frac{1}{2"),
        ("\\boxed{3}", "####", None),
    ],
)
def test_rest_of_line(completion: str, marker: str, answer: str | None) -> None:
    assert extract_answer(completion, marker) == answer


balanced = st.recursive(
    st.text(st.characters(exclude_characters="{}\\")),
    lambda inner: st.lists(inner.map(lambda s: "{" + s + "}")).map("".join),
)


@given(st.text(), balanced, st.text(st.characters(exclude_characters="\\")))
def test_a_balanced_box_is_returned_whole(before: str, content: str, after: str) -> None:
    before = before.rstrip("\\")
    assert extract_answer(f"{before}\\boxed{{{content}}}{after}", BOXED) == (content.strip() or None)


@given(st.text("{}\\boxed# 1\n"), st.sampled_from([BOXED, "####", "o"]))
def test_an_answer_is_a_stripped_piece_of_the_completion(completion: str, marker: str) -> None:
    answer = extract_answer(completion, marker)
    assert answer is None or (answer and answer == answer.strip() and answer in completion)


@given(balanced)
def test_a_cut_box_is_no_answer(content: str) -> None:
    assert extract_answer(f"\\boxed{{1}} \\boxed{{{{{content}}}", BOXED) is None


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("\\boxed{" * MEGA, None),
        ("\\boxed" * MEGA, None),
        ("\\boxed " * MEGA, None),
        ("\\fbox{" * MEGA, None),
        ("\\boxed " + "7" * MEGA + "x", None),
        ("\\boxed" + " " * MEGA, None),
        ("\\boxed{" + "{" * MEGA, None),
        ("\\boxed{" + "\\" * MEGA, None),
        ("\\boxed{" + "{" * MEGA + "}" * MEGA + "}", "{" * MEGA + "}" * MEGA),
        ("\\boxed{" + "7" * MEGA + "}" * MEGA, "7" * MEGA),
    ],
    ids=[
        "open boxes",
        "markers",
        "spaced markers",
        "frames",
        "number",
        "spaces",
        "braces",
        "escapes",
        "nested",
        "digits",
    ],
)
def test_megabytes_take_linear_time(completion: str, answer: str | None) -> None:
    start = time.process_time()
    assert extract_answer(completion, BOXED) == answer
    assert time.process_time() - start < 3.0  # a quadratic scan would take hours
