"""Evaluation: pass@k and mean@k by hand, and every score with the problem it belongs to."""

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from policy.tokenizer import train_tokenizer
from reward.result import Reason, RewardResult
from rl.evaluate import evaluate, evaluation_table, pass_at_k
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


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [(4, 1, 2, 0.5), (4, 0, 4, 0.0), (4, 1, 4, 1.0), (10, 3, 5, 1 - 21 / 252), (5, 3, 1, 0.6), (3, 3, 2, 1.0)],
)
def test_pass_at_k_by_hand(samples: int, correct: int, k: int, expected: float) -> None:
    """1 - C(samples - correct, k) / C(samples, k), as in C(3, 2) / C(4, 2) = 3 / 6."""
    assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-15)


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
        return [RewardResult.of(_verdict(text, gold), text, 0.0) for text, gold in items]

    result = evaluate(prompts, len(texts[0]), SAMPLING, 11, tokenizer, generate, score)
    return result, asked[0], pairs


def _reason(text: str) -> str:
    return "length" if len(text) > 1 else "stop"


def _verdict(text: str, gold: str) -> Reason:
    if text == "9":
        return Reason.TIMEOUT
    return Reason.CORRECT_INTEGER if text == gold else Reason.WRONG_INTEGER


def test_scores_by_hand(tokenizer: PreTrainedTokenizerBase) -> None:
    """Right: 1 of 4, 0 of 4, 4 of 4; so mean 5/12, and two of three problems are passed."""
    result, _, _ = _run(tokenizer, [["3", "4", "4", "44"], ["9", "3", "5", "3"], ["5", "5", "5", "5"]])
    assert result["mean@4"] == pytest.approx(5 / 12)
    assert result["pass@4"] == pytest.approx(2 / 3)
    assert result["by_family"] == {"counting": 0.625, "remainder": 0.0}
    assert result["rows"] == [
        {"id": "row-0", "answer": "3", "correct": 1.0, "samples": 4},
        {"id": "row-1", "answer": "4", "correct": 0.0, "samples": 4},
        {"id": "row-2", "answer": "5", "correct": 4.0, "samples": 4},
    ]
    assert (result["problems"], result["samples"], result["verifier_failures"]) == (3, 4, 1)
    assert result["mean_length"] == pytest.approx(13 / 12)
    assert result["truncated_fraction"] == pytest.approx(1 / 12)
    assert 0 <= result["ci95"][0] < 5 / 12 < result["ci95"][1] <= 1


def test_interval_has_no_width_where_all_problems_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    result, _, _ = _run(tokenizer, [["3"], ["4"], ["5"]])
    assert result["ci95"] == [1.0, 1.0]


def test_every_completion_is_scored_against_its_own_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    reordered = [PROMPTS[2], PROMPTS[0], PROMPTS[1]]
    result, _, pairs = _run(tokenizer, [["5", "1"], ["3", "2"], ["0", "4"]], reordered)
    assert pairs == [("5", "5"), ("1", "5"), ("3", "3"), ("2", "3"), ("0", "4"), ("4", "4")]
    assert [row["id"] for row in result["rows"]] == ["row-2", "row-0", "row-1"]
    assert result["pass@2"] == 1.0 and result["mean@2"] == 0.5


def test_evaluation_shares_no_draw_with_training(tokenizer: PreTrainedTokenizerBase) -> None:
    """A training seed is below 2^32, so a seed above it addresses other draws."""
    _, requests, _ = _run(tokenizer, [["3"], ["4"], ["5"]])
    assert [(request.seed, request.step, request.prompt) for request in requests] == [
        (2**32 + 11, 0, 0),
        (2**32 + 11, 0, 1),
        (2**32 + 11, 0, 2),
    ]
    assert all(request.sampling == SAMPLING for request in requests)


def test_table_shows_the_scores_and_how_they_were_sampled(tokenizer: PreTrainedTokenizerBase) -> None:
    result, _, _ = _run(tokenizer, [["3", "4"], ["4", "0"], ["0", "0"]])
    console = Console(width=120)
    with console.capture() as capture:
        console.print(evaluation_table("some/policy", "synthetic", result))
    for expected in ("some/policy on synthetic", "0.3333", "0.6667", "temperature 0.7, top_p 0.9", "mean, counting"):
        assert expected in capture.get()
