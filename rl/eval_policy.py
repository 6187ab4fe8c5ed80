"""`lockstep eval`, whole: problems in, completions streamed from the engine, a result that a rerun repeats."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from reward.config import RewardConfig
from reward.pool import RewardPool
from rl.data import load_problems
from rl.data_config import PROMPT_FIELDS, SYNTHETIC
from rl.eval_journal import Journal, completions_path, open_journal
from rl.eval_problem import ProblemResult
from rl.eval_progress import EvaluationProgress
from rl.evaluate import Score, ask, grade_as_finished, problems_digest, summarise
from rl.export import policy_folder, prompt_config, read_manifest
from rl.local_engine import open_engine, stream
from rl.monitor import replace_text
from rl.prompts import Prompt, encode_prompts
from rl.weight_sync import policy_digest
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Request, SamplingParams

SYNTHETIC_PROBLEMS = 200


@dataclass(frozen=True)
class EvaluationSettings:
    """What `lockstep eval` is asked for; max_new_tokens None is all that the policy's positions leave room for.

    max_batch and memory_mb are the engine's, and change no bit of the result.
    """

    policy: Path
    data: str
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int | None
    max_problems: int
    seed: int
    max_batch: int
    memory_mb: int


def evaluate_policy(settings: EvaluationSettings, json_file: Path | None, console: Console) -> dict[str, Any]:
    """Evaluates, writes the result and its completions where there is a `json_file`, and returns the result.

    With a `json_file`, what an earlier process left of the same evaluation is taken up instead of sampled again.
    """
    folder = policy_folder(settings.policy)
    manifest = read_manifest(folder)
    engine, tokenizer = open_engine(folder, RolloutConfig(max_batch=settings.max_batch, memory_mb=settings.memory_mb))
    prompts = _prompts(settings, manifest, engine, tokenizer)
    sampling = _sampling(settings, prompts, engine)
    identity = _identity(settings, manifest, engine, prompts, sampling)
    with (
        open_journal(json_file, identity) if json_file else nullcontext() as journal,
        RewardPool(RewardConfig(answer_marker=manifest["answer_marker"])) as pool,
    ):
        requests = ask(prompts, settings.samples, sampling, settings.seed)
        problems = _answered(prompts, requests, engine, tokenizer, pool.score, journal, console)
        summary = summarise(problems, sampling, settings.seed)
        result = {"policy": str(settings.policy), "data": settings.data, **identity, **summary}
        if json_file and journal:
            replace_text(json_file, json.dumps(result, indent=2) + "\n")
            journal.finish(completions_path(json_file))
    return result


def _prompts(
    settings: EvaluationSettings, manifest: Mapping[str, Any], engine: Engine, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    size = min(SYNTHETIC_PROBLEMS, settings.max_problems) if settings.data == SYNTHETIC else settings.max_problems
    changes = {
        "eval": settings.data,
        "eval_size": size,
        "max_prompt_tokens": engine.policy.config.max_position_embeddings,
    }
    config = prompt_config(manifest).model_copy(update=changes)
    return encode_prompts(load_problems(config, "eval", settings.seed), config, tokenizer)


def _sampling(settings: EvaluationSettings, prompts: list[Prompt], engine: Engine) -> SamplingParams:
    longest = max(len(prompt.token_ids) for prompt in prompts)
    positions = engine.policy.config.max_position_embeddings
    wanted = settings.max_new_tokens or max(positions - longest, 1)
    if longest + wanted > positions:
        raise ValueError(
            f"--max-new-tokens {wanted}: the policy has {positions} positions and the longest prompt takes {longest}; "
            f"give at most {max(positions - longest, 0)}, or shorter problems"
        )
    return SamplingParams(wanted, settings.temperature, settings.top_p)


def _identity(
    settings: EvaluationSettings,
    manifest: Mapping[str, Any],
    engine: Engine,
    prompts: list[Prompt],
    sampling: SamplingParams,
) -> dict[str, Any]:
    """All that decides the completions and their verdicts."""
    return {
        "weights_digest": policy_digest(engine.policy),
        "dtype": engine.describe()["dtype"],
        "torch": torch.__version__,
        **{name: manifest[name] for name in PROMPT_FIELDS},
        "answer_marker": manifest["answer_marker"],
        "problems_digest": problems_digest([prompt.row for prompt in prompts]),
        "samples": settings.samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": settings.seed,
    }


def _answered(
    prompts: list[Prompt],
    requests: list[Request],
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    score: Score,
    journal: Journal | None,
    console: Console,
) -> list[ProblemResult]:
    """The graded problems in order, those of the journal as they are; completions keep their texts on disk only."""
    problems = dict(journal.problems) if journal else {}
    samples = requests[0].num_samples
    if problems:
        console.print(f"{len(problems)} of {len(prompts)} problems were finished before; going on", highlight=False)
    with EvaluationProgress(console, len(problems), len(prompts), samples) as progress:
        open_requests = [request for request in requests if request.request_id not in problems]
        completions = progress.count(stream(engine, open_requests))
        for problem in grade_as_finished(prompts, completions, samples, tokenizer, score):
            if journal:
                journal.append(problem)
            problems[problem.index] = problem.without_texts()
            progress.finish(problem)
    return [problems[prompt.index] for prompt in prompts]
