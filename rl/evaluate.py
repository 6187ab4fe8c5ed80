"""Evaluation on held-out problems: which completions are sampled, how they are graded, and what result they make."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from reward.result import RewardResult
from rl.data_columns import Row
from rl.eval_problem import Graded, ProblemResult
from rl.eval_scores import length_statistics, scores
from rl.prompts import Prompt, completion_text
from rollout.request import Completion, Request, SamplingParams

Generate = Callable[[list[Request]], list[Completion]]
Score = Callable[[list[tuple[str, str]]], list[RewardResult]]

# Evaluation must not share a random draw with training, so it takes its own key.
EVALUATION_KEY = 1 << 32


def evaluate(
    prompts: Sequence[Prompt],
    samples: int,
    sampling: SamplingParams,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    generate: Generate,
    score: Score,
) -> dict[str, Any]:
    """Samples every prompt `samples` times and returns the JSON-ready result, with one row for each problem."""
    completions = generate(ask(prompts, samples, sampling, seed))
    return summarise(grade(prompts, completions, tokenizer, score), sampling, seed)


def ask(prompts: Sequence[Prompt], samples: int, sampling: SamplingParams, seed: int) -> list[Request]:
    """A request for each prompt. A completion depends on seed, prompt and sample number, not on who else is asked."""
    return [
        Request(prompt.index, prompt.token_ids, samples, sampling, seed=EVALUATION_KEY | seed, prompt=prompt.index)
        for prompt in prompts
    ]


def grade(
    prompts: Sequence[Prompt], completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, score: Score
) -> list[ProblemResult]:
    """Scores the completions, which are those of the first prompt by sample number, then of the second, and so on."""
    samples = len(completions) // len(prompts)
    asked = [prompt for prompt in prompts for _ in range(samples)]
    assert [prompt.index for prompt in asked] == [completion.request_id for completion in completions]
    texts = [completion_text(completion.token_ids, tokenizer) for completion in completions]
    results = score([(text, prompt.row.answer) for text, prompt in zip(texts, asked, strict=True)])
    graded = [Graded.of(*each) for each in zip(completions, texts, results, strict=True)]
    return [
        ProblemResult(prompt.row, prompt.index, tuple(graded[place * samples : (place + 1) * samples]))
        for place, prompt in enumerate(prompts)
    ]


def grade_as_finished(
    prompts: Sequence[Prompt],
    completions: Iterable[Completion],
    samples: int,
    tokenizer: PreTrainedTokenizerBase,
    score: Score,
) -> Iterator[ProblemResult]:
    """Each problem as soon as its last completion is there; completions may come in any order."""
    by_index = {prompt.index: prompt for prompt in prompts}
    waiting: dict[int, list[Completion]] = {}
    for completion in completions:
        group = waiting.setdefault(completion.request_id, [])
        group.append(completion)
        if len(group) == samples:
            ordered = sorted(waiting.pop(completion.request_id), key=lambda each: each.sample)
            yield from grade([by_index[completion.request_id]], ordered, tokenizer, score)


def summarise(problems: Sequence[ProblemResult], sampling: SamplingParams, seed: int) -> dict[str, Any]:
    """The JSON-ready result. It holds nothing that differs when the evaluation is run again, so no times.

    Truncated completions count as they are scored; a completion whose verification failed counts as wrong, and
    `verifier_failures` says how many there are.
    """
    completions = [each for problem in problems for each in problem.completions]
    return {
        **scores(problems, seed),
        "problems": len(problems),
        "samples": len(problems[0].completions),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": seed,
        "length": length_statistics(problems),
        "truncated_fraction": float(np.mean([each.truncated for each in completions])),
        "no_answer_fraction": float(np.mean([each.extracted is None for each in completions])),
        "verifier_failures": sum(each.is_failure for each in completions),
        "by_family": _by_source(problems),
        "problems_digest": problems_digest([problem.row for problem in problems]),
        "rows": [problem.summary() for problem in problems],
    }


def problems_digest(rows: Sequence[Row]) -> str:
    """SHA-256 in hex over what is asked and answered, in whatever order the problems were read, from wherever."""
    content = sorted([row.id, row.problem, row.answer, *row.messages] for row in rows)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _by_source(problems: Sequence[ProblemResult]) -> dict[str, float]:
    averages: dict[str, list[float]] = {}
    for problem in problems:
        source = problem.row.source.rpartition("/")[2]
        averages.setdefault(source, []).append(problem.correct / len(problem.completions))
    return {source: float(np.mean(averages[source])) for source in sorted(averages)}
