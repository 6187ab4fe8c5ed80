"""Evaluation: what is asked, every verdict with the problem it belongs to, and the result they make."""

import pytest
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from policy.tokenizer import train_tokenizer
from reward.result import Reason, RewardResult
from rl.data_columns import Row
from rl.eval_table import evaluation_table, problem_table, shortened
from rl.evaluate import evaluate, grade, grade_as_finished, problems_digest
from rl.prompts import Prompt
from rollout.request import Completion, Request, SamplingParams
from tests.rl.tiny import make_completion, make_prompt

PROMPTS = [
    make_prompt(0, "3", "counting"),
    make_prompt(1, "4", "remainder"),
    make_prompt(2, "5", "counting"),
]
SAMPLING = SamplingParams(max_new_tokens=6, temperature=0.7, top_p=0.9)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["0123456789 no"], 300)


def _run(tokenizer: PreTrainedTokenizerBase, texts: list[list[str]], prompts: list[Prompt] = PROMPTS) -> tuple:
    """evaluate() with completions given as text; returns the result, the requests and the pairs to score."""
    asked: list[list[Request]] = []
    pairs: list[tuple[str, str]] = []

    def generate(requests: list[Request]) -> list[Completion]:
        asked.append(requests)
        rows = zip(requests, texts, strict=True)
        return [
            make_completion(request.request_id, sample, tuple(tokenizer(text)["input_ids"]), _reason(text))
            for request, row in rows
            for sample, text in enumerate(row)
        ]

    def score(items: list[tuple[str, str]]) -> list[RewardResult]:
        pairs.extend(items)
        return [_verdict(text, gold) for text, gold in items]

    result = evaluate(prompts, len(texts[0]), SAMPLING, 11, tokenizer, generate, score)
    return result, asked[0], pairs


def _reason(text: str) -> str:
    return "length" if len(text) > 1 else "stop"


def _verdict(text: str, gold: str) -> RewardResult:
    """ "9" makes the verifier fail, "n" is no answer."""
    reasons = {"9": Reason.TIMEOUT, "n": Reason.NO_ANSWER, gold: Reason.CORRECT}
    return RewardResult.of(reasons.get(text, Reason.WRONG), None if text == "n" else text, 0.0)


def test_scores_by_hand(tokenizer: PreTrainedTokenizerBase) -> None:
    """Right: 1 of 4, 0 of 4, 4 of 4; so mean 5/12, and two of three problems are passed."""
    result, _, _ = _run(tokenizer, [["3", "4", "4", "44"], ["9", "3", "5", "3"], ["5", "5", "5", "5"]])
    assert result["avg@4"] == pytest.approx(5 / 12)
    assert result["pass@4"] == pytest.approx(2 / 3)
    assert result["cons@4"] == pytest.approx(1 / 3)  # 4 and 3 win the first two votes: wrong
    assert result["by_family"] == {"counting": 0.625, "remainder": 0.0}
    assert [(row["id"], row["answer"], row["correct"], row["samples"]) for row in result["rows"]] == [
        ("row-0", "3", 1, 4),
        ("row-1", "4", 0, 4),
        ("row-2", "5", 4, 4),
    ]
    assert [(row["majority"], row["majority_correct"]) for row in result["rows"]] == [
        ("4", False),
        ("3", False),
        ("5", True),
    ]
    assert (result["problems"], result["samples"], result["verifier_failures"]) == (3, 4, 1)
    assert result["length"]["all"] == {"mean": pytest.approx(13 / 12), "p50": 1.0, "p90": 1.0, "max": 2}
    assert result["truncated_fraction"] == pytest.approx(1 / 12) and result["no_answer_fraction"] == 0.0
    assert 0 <= result["ci95"]["avg@4"][0] < 5 / 12 < result["ci95"]["avg@4"][1] <= 1


def test_the_result_says_how_it_was_sampled(tokenizer: PreTrainedTokenizerBase) -> None:
    result, _, _ = _run(tokenizer, [["3"], ["4"], ["5"]])
    settings = {name: result[name] for name in ("temperature", "top_p", "max_new_tokens", "seed")}
    assert settings == {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 6, "seed": 11}


def test_no_answer_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    result, _, _ = _run(tokenizer, [["3", "n"], ["n", "n"], ["5", "5"]])
    assert result["no_answer_fraction"] == pytest.approx(3 / 6) and result["cons@2"] == pytest.approx(2 / 3)
    assert [row["no_answer"] for row in result["rows"]] == [1, 2, 0]


def test_interval_has_no_width_where_all_problems_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    result, _, _ = _run(tokenizer, [["3"], ["4"], ["5"]])
    assert result["ci95"] == {"avg@1": (1.0, 1.0), "cons@1": (1.0, 1.0)}


def test_every_completion_is_scored_against_its_own_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    reordered = [PROMPTS[2], PROMPTS[0], PROMPTS[1]]
    result, _, pairs = _run(tokenizer, [["5", "1"], ["3", "2"], ["0", "4"]], reordered)
    assert pairs == [("5", "5"), ("1", "5"), ("3", "3"), ("2", "3"), ("0", "4"), ("4", "4")]
    assert [row["id"] for row in result["rows"]] == ["row-2", "row-0", "row-1"]
    assert result["pass@2"] == 1.0 and result["avg@2"] == 0.5


def test_evaluation_shares_no_draw_with_training(tokenizer: PreTrainedTokenizerBase) -> None:
    """A training seed is below 2^32, so a seed above it addresses other draws."""
    _, requests, _ = _run(tokenizer, [["3"], ["4"], ["5"]])
    assert [(request.seed, request.step, request.prompt) for request in requests] == [
        (2**32 + 11, 0, 0),
        (2**32 + 11, 0, 1),
        (2**32 + 11, 0, 2),
    ]
    assert all(request.sampling == SAMPLING for request in requests)


def test_problems_are_graded_as_they_finish(tokenizer: PreTrainedTokenizerBase) -> None:
    """Completions in any order make the same problems, the one first whose last completion is there first."""
    texts = {0: ("3", "4"), 1: ("4", "0"), 2: ("5", "5")}
    arriving = [(2, 1), (0, 1), (1, 0), (2, 0), (1, 1), (0, 0)]
    completions = [
        make_completion(index, sample, tuple(tokenizer(texts[index][sample])["input_ids"]))
        for index, sample in arriving
    ]

    def score(items: list[tuple[str, str]]) -> list[RewardResult]:
        return [_verdict(text, gold) for text, gold in items]

    found = list(grade_as_finished(PROMPTS, iter(completions), 2, tokenizer, score))
    ordered = sorted(completions, key=lambda each: (each.request_id, each.sample))
    expected = grade(PROMPTS, ordered, tokenizer, score)
    assert [each.index for each in found] == [2, 1, 0]
    assert sorted(found, key=lambda each: each.index) == expected
    assert [each.correct for each in expected] == [1, 1, 2]


def test_the_digest_of_problems_is_that_of_their_content() -> None:
    rows = [Row("a", "1 + 1?", "2", "one.jsonl"), Row("b", "2 + 2?", "4", "one.jsonl")]
    elsewhere = [Row(row.id, row.problem, row.answer, "other/two.parquet") for row in reversed(rows)]
    assert problems_digest(rows) == problems_digest(elsewhere)
    changed = [Row("a", "1 + 1?", "3", "one.jsonl"), Row("a", "1 + 2?", "2", "one.jsonl"), Row("c", "1 + 1?", "2", "")]
    assert len({problems_digest([first, rows[1]]) for first in (rows[0], *changed)}) == 4


def _printed(table: Table) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_table_shows_the_scores_and_how_they_were_sampled(tokenizer: PreTrainedTokenizerBase) -> None:
    result, _, _ = _run(tokenizer, [["3", "4"], ["4", "0"], ["0", "0"]])
    shown = _printed(evaluation_table("some/policy", "[red]set", result))
    for expected in (
        "some/policy on [red]set",
        "0.3333 (95% interval 0.0000 to 0.5000)",
        "pass@2",
        "0.6667",
        "temperature 0.7, top_p 0.9, at most 6 tokens, seed 11",
        "mean 1.0, p50 1, p90 1, max 1",
        "avg@2, counting",
    ):
        assert expected in shown


def test_problem_table_shows_a_row_for_each_problem(tokenizer: PreTrainedTokenizerBase) -> None:
    result, _, _ = _run(tokenizer, [["3", "4"], ["4", "n"], ["n", "n"]])
    lines = [" ".join(line.replace("│", " ").split()) for line in _printed(problem_table(result)).splitlines()]
    assert "row-0 1 of 2 1.0 0 0 3 (right) 3" in lines
    assert "row-1 1 of 2 1.0 0 1 4 (right) 4" in lines
    assert "row-2 0 of 2 1.0 0 2 - 5" in lines


def test_problem_table_says_what_it_leaves_out(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [make_prompt(index, "3") for index in range(43)]
    result, _, _ = _run(tokenizer, [["3"]] * 43, prompts)
    assert "row-39" in _printed(problem_table(result)) and "row-40" not in _printed(problem_table(result))
    assert "and 3 more: --json writes them all" in _printed(problem_table(result))


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("7", "7"),
        ("a\n  b", "a b"),
        ("9" * 40, "9" * 40),
        ("9" * 41, "9" * 39 + "…"),
        ("\x1b[31mred\x00", "\ufffd[31mred\ufffd"),
        ("\u202e321", "\ufffd321"),
    ],
)
def test_an_answer_is_shown_on_one_line_without_what_a_terminal_would_obey(answer: str, shown: str) -> None:
    assert shortened(answer) == shown
