"""Evaluation on held-out problems: mean@k, pass@k, lengths, with a bootstrap interval over problems."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from reward.result import RewardResult
from rl.prompts import Prompt, completion_text
from rollout.request import Completion, Request, SamplingParams

Generate = Callable[[list[Request]], list[Completion]]
Score = Callable[[list[tuple[str, str]]], list[RewardResult]]

BOOTSTRAP_DRAWS = 1000
# Evaluation must not share a random draw with training, so it takes its own key.
EVALUATION_KEY = 1 << 32


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k completions is right (Chen et al., 2107.03374 Eq. 1)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


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
    requests = [
        Request(prompt.index, prompt.token_ids, samples, sampling, seed=EVALUATION_KEY | seed, prompt=prompt.index)
        for prompt in prompts
    ]
    completions = generate(requests)
    by_index = {prompt.index: prompt for prompt in prompts}
    answers = [by_index[completion.request_id].row.answer for completion in completions]
    results = score(
        [(completion_text(c.token_ids, tokenizer), gold) for c, gold in zip(completions, answers, strict=True)]
    )
    scores = np.array([result.score for result in results]).reshape(len(prompts), samples)
    lengths = [len(completion.token_ids) for completion in completions]
    return {
        **_scores(scores, seed),
        "problems": len(prompts),
        "samples": samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "mean_length": float(np.mean(lengths)),
        "truncated_fraction": float(np.mean([completion.finish_reason == "length" for completion in completions])),
        "verifier_failures": sum(result.is_failure for result in results),
        "by_family": _by_source(prompts, scores),
        "rows": [
            {"id": prompt.row.id, "answer": prompt.row.answer, "correct": float(row.sum()), "samples": samples}
            for prompt, row in zip(prompts, scores, strict=True)
        ],
    }


def _scores(scores: np.ndarray, seed: int) -> dict[str, Any]:
    """scores FP64 [problems, k]."""
    k = scores.shape[1]
    per_problem = scores.mean(1)
    draws = np.random.Generator(np.random.Philox(key=seed)).integers(len(scores), size=(BOOTSTRAP_DRAWS, len(scores)))
    low, high = np.quantile(per_problem[draws].mean(1), [0.025, 0.975])
    passed = [pass_at_k(k, int(correct), k) for correct in (scores > 0).sum(1)]
    return {
        f"mean@{k}": float(per_problem.mean()),
        f"pass@{k}": float(np.mean(passed)),
        "ci95": [float(low), float(high)],
    }


def _by_source(prompts: Sequence[Prompt], scores: np.ndarray) -> dict[str, float]:
    sources = np.array([prompt.row.source.rpartition("/")[2] for prompt in prompts])
    return {source: float(scores[sources == source].mean()) for source in sorted(set(sources.tolist()))}


def evaluation_table(policy: str, data: str, result: dict[str, Any]) -> Table:
    """The result as `lockstep eval` prints it."""
    table = Table(title=f"{policy} on {data}", show_header=False)
    scores = {name: f"{value:.4f}" for name, value in result.items() if name.startswith(("mean@", "pass@"))}
    low, high = result["ci95"]
    sampling = (
        f"temperature {result['temperature']}, top_p {result['top_p']}, at most {result['max_new_tokens']} tokens"
    )
    rows = {
        **scores,
        "95% interval of the mean": f"{low:.4f} - {high:.4f} (bootstrap over problems)",
        "problems x samples": f"{result['problems']} x {result['samples']}",
        "sampling": sampling,
        "mean length": f"{result['mean_length']:.1f} tokens, {result['truncated_fraction']:.1%} truncated",
        "verifier failures": str(result["verifier_failures"]),
        **{f"mean, {name}": f"{value:.4f}" for name, value in result["by_family"].items()},
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
