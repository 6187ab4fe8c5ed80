"""The page of an evaluation: it shows every problem, stays small, and nothing from the model becomes an element."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.eval_page import MAX_TEXTS, write_evaluation_page
from rl.eval_problem import Graded, ProblemResult
from rl.evaluate import summarise
from rollout.request import SamplingParams
from tests.rl.graded import graded, problem
from tests.rl.page import HOSTILE, Page, digest


def page_of(folder: Path, problems: list[ProblemResult], **changes: Any) -> Page:
    """The page of an evaluation with these problems; `changes` replace parts of its result."""
    completions = folder / "result.completions.jsonl"
    completions.write_text("".join(json.dumps(each.to_json()) + "\n" for each in problems))
    identity = {"policy": "some/policy", "data": "set.jsonl", "weights_digest": "9f86d081", "dtype": "float32"}
    identity |= {"torch": "2.13.0", "prompt_template": "{problem}\n", "answer_marker": "\\boxed"}
    result = {**identity, **summarise(problems, SamplingParams(96, 0.6), seed=0), **changes}
    write_evaluation_page(folder / "result.html", result, completions)
    return Page((folder / "result.html").read_text(encoding="utf-8"))


def two_problems(text: Callable[[str], str] = str) -> list[ProblemResult]:
    """A right, a wrong, a truncated completion and one without an answer; every text changed by `text`."""
    completions = [
        graded(text("3"), correct=True, text=text("it is 3")),
        graded(text("4"), length=40, text=text("it is 4")),
        graded(text("5"), length=96, finish_reason="length"),
        graded(None, text=text("who knows")),
    ]
    rows = [problem(0, *completions, answer=text("3")), problem(1, *completions, answer=text("3"))]
    return [ProblemResult(each.row, each.index, each.completions) for each in rows]


def test_the_page_shows_scores_settings_and_every_problem(tmp_path: Path) -> None:
    page = page_of(tmp_path, two_problems())
    for shown in (
        "some/policy on set.jsonl",
        "avg@4 0.250 95% interval 0.250 to 0.250",
        "pass@4 1.000",
        "cons@4 1.000",
        "pass@2 0.5000 (95% interval 0.5000 to 0.5000)",
        "temperature 0.6, top_p 1.0, at most 96 tokens, seed 0",
        "length, correct mean 4.0, p50 4, p90 4, max 4",
        "truncated 25.0% of the completions",
        "1 of 4 row-0 answer 3 majority 3 right",
        "1 of 4 row-1 answer 3 majority 3 right",
        "right sample 0 correct answer 3 4 tokens, stop it is 3",
        "wrong sample 3 no_answer answer no answer 4 tokens, stop who knows",
        "at most 8 of its completions; all are in result.completions.jsonl",
        "weights digest 9f86d081",
    ):
        assert shown in page.words
    squares = [value for tag, name, value in page.attributes if (tag, name) == ("span", "class")]
    assert [square for square in squares if square in ("right", "wrong", "cut", "none")][4:] == (
        ["right", "wrong", "cut", "none"] * 2
    )
    assert ("span", "title", "sample 1: 4, wrong, 40 tokens, stop") in page.attributes
    assert page.elements["svg"] == 2


def test_no_text_of_model_or_data_becomes_an_element_or_attribute(tmp_path: Path) -> None:
    hostile = dict.fromkeys(("policy", "data", "prompt_template", "answer_marker", "torch"), HOSTILE)
    plain = page_of(tmp_path, two_problems(), by_family={"a": 0.5, "b": 0.5})
    found = page_of(tmp_path, two_problems(lambda text: text + HOSTILE), by_family={"a": 0.5, HOSTILE: 0.5}, **hostile)
    assert found.elements == plain.elements
    assert [(tag, name) for tag, name, _ in found.attributes] == [(tag, name) for tag, name, _ in plain.attributes]
    assert found.requests == []
    for shown in ("it is 3", "it is 4", "who knows"):
        assert shown + HOSTILE in found.words


@settings(max_examples=20, deadline=None)
@given(st.text(st.characters()))
def test_any_completion_is_shown_as_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    plain = page_of(folder, [problem(0, graded("3", text="so"), answer="3")])
    page = page_of(folder, [problem(0, graded(text, text=text), answer=text)])
    assert page.elements == plain.elements
    assert [name for _, name, _ in page.attributes] == [name for _, name, _ in plain.attributes]


def test_the_page_asks_for_nothing_and_forbids_scripts(tmp_path: Path) -> None:
    page = page_of(tmp_path, two_problems())
    assert page.rules.keys() == {"default-src", "base-uri", "form-action", "style-src"}
    assert page.rules["default-src"] == "'none'"
    assert page.rules["style-src"] == " ".join(map(digest, page.code["style"]))
    assert page.requests == [] and "script" not in page.elements
    written = (tmp_path / "result.html").read_text()
    assert "url(" not in written and "@import" not in written


def test_a_right_and_a_wrong_completion_are_shown_where_there_are_both(tmp_path: Path) -> None:
    completions = [graded("1", text=f"wrong {sample}") for sample in range(9)]
    completions.insert(6, graded("3", correct=True, text="the only right one"))
    completions += [graded("1", text="wrong 9")] * 20
    words = page_of(tmp_path, [problem(0, *completions)]).words
    assert "the only right one" in words
    assert "wrong 5 right" in words and "wrong 6" in words and "wrong 7" not in words


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    words = page_of(tmp_path, [problem(0, graded("9" * 5000, text="x" * 5000))]).words
    assert "x" * 2000 + " … [3,000 more characters]" in words and "9" * 41 not in words
    assert "9" * 39 + "…" in words


def test_a_page_of_many_problems_shows_one_completion_of_each(tmp_path: Path) -> None:
    shown: tuple[Graded, ...] = (graded("3", text="one shown"), graded("4", text="not shown"))
    page = page_of(tmp_path, [problem(index, *shown) for index in range(MAX_TEXTS + 1)])
    assert page.words.count("one shown") == MAX_TEXTS + 1 and "not shown" not in page.words
    assert "at most 1 of its completions" in page.words
