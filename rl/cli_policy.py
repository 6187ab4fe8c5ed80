"""Commands on a policy folder or a finished run: eval, generate, export. They run in this process, without Ray."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rl.cli_support import clear_errors, console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollout.engine import Engine

PolicyArgument = Annotated[Path, typer.Argument(help="Hugging Face folder of a policy, or a run folder.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides every sampled token.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus of probability that is sampled from; 1 is off.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")]


def _open(folder: Path, max_batch: int) -> "tuple[Engine, PreTrainedTokenizerBase]":
    from policy.checkpoint import load_policy
    from policy.tokenizer import load_tokenizer
    from rollout.config import RolloutConfig
    from rollout.engine import Engine

    policy = load_policy(folder).to_working_dtype()
    return Engine(policy, RolloutConfig(max_batch=max_batch)), load_tokenizer(folder)


def eval_policy(
    policy: PolicyArgument,
    data: Annotated[
        str, typer.Option(help="Problems: a .jsonl, .json or .parquet file, a dataset name, or synthetic.")
    ],
    samples: Annotated[int, typer.Option(min=1, help="Completions for each problem.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file too.")] = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 96,
    max_problems: Annotated[int, typer.Option(min=1, help="At most the first so many problems.")] = 1000,
    seed: Seed = 0,
) -> None:
    """Scores a policy on problems with known answers: mean@k and pass@k."""
    with clear_errors():
        import json

        from reward.config import RewardConfig
        from reward.pool import RewardPool
        from rl.data import load_problems
        from rl.data_config import DataConfig
        from rl.evaluate import evaluate, evaluation_table
        from rl.export import policy_folder, read_manifest
        from rl.monitor import replace_text
        from rl.prompts import encode_prompts
        from rollout.request import SamplingParams

        folder = policy_folder(policy)
        engine, tokenizer = _open(folder, max_batch=256)
        manifest = read_manifest(folder)
        size = min(200, max_problems) if data == "synthetic" else max_problems
        limit = max(engine.policy.config.max_position_embeddings - max_new_tokens, 1)
        config = DataConfig(
            eval=data, eval_size=size, max_prompt_tokens=limit, prompt_template=manifest["prompt_template"]
        )
        prompts = encode_prompts(load_problems(config, "eval", seed), config, tokenizer)
        sampling = SamplingParams(max_new_tokens, temperature, top_p)
        with RewardPool(RewardConfig(answer_marker=manifest["answer_marker"])) as pool:
            result = evaluate(prompts, samples, sampling, seed, tokenizer, engine.generate, pool.score)
        console.print(evaluation_table(str(policy), data, result))
        if json_file:
            replace_text(json_file, json.dumps({"policy": str(policy), "data": data, **result}, indent=2) + "\n")


def generate_text(
    policy: PolicyArgument,
    prompt: Annotated[str, typer.Option(help="The problem; the policy's own prompt template is put around it.")],
    samples: Annotated[int, typer.Option(min=1, help="Completions to print.")] = 1,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 96,
    seed: Seed = 0,
) -> None:
    """Completes a prompt and prints what the policy says."""
    with clear_errors():
        import numpy as np

        from rl.data_config import DataConfig
        from rl.export import policy_folder, read_manifest
        from rl.prompts import completion_text
        from rollout.request import Request, SamplingParams

        folder = policy_folder(policy)
        engine, tokenizer = _open(folder, max_batch=min(samples, 64))
        text = DataConfig(prompt_template=read_manifest(folder)["prompt_template"]).prompt(prompt)
        ids = np.array(tokenizer(text)["input_ids"], dtype=np.int64)
        sampling = SamplingParams(max_new_tokens, temperature, top_p)
        for completion in engine.generate([Request(0, ids, samples, sampling, seed=seed)]):
            text = completion_text(completion.token_ids, tokenizer)
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def export(
    run: Annotated[Path, typer.Argument(help="Run folder, finished or not.")],
    out: Annotated[Path, typer.Option(help="New folder for the policy.")],
) -> None:
    """Exports the newest checkpoint of a run as a Hugging Face folder."""
    with clear_errors():
        from rl.export import export_run

        digest, step = export_run(run, out)
        console.print(f"policy after {step} steps in {out}, weights digest {digest}", highlight=False, soft_wrap=True)
