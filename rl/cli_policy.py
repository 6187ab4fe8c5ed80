"""Commands on a policy folder or a run: generate, export. They run in this process, without Ray."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rl.cli_support import PolicyArgument, Seed, clear_errors, console

Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus of probability that is sampled from; 1 is off.")]
ExportDtype = Literal["bfloat16", "float32", "fp8"]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")]


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

        from rl.export import policy_folder, prompt_config, read_manifest
        from rl.local_engine import open_engine
        from rl.prompts import completion_text, encode_problem
        from rollout.config import RolloutConfig
        from rollout.request import Request, SamplingParams

        folder = policy_folder(policy)
        engine, tokenizer = open_engine(folder, RolloutConfig(max_batch=min(samples, 64)))
        ids = np.array(encode_problem(prompt, prompt_config(read_manifest(folder)), tokenizer), dtype=np.int64)
        sampling = SamplingParams(max_new_tokens, temperature, top_p)
        for completion in engine.generate([Request(0, ids, samples, sampling, seed=seed)]):
            text = completion_text(completion.token_ids, tokenizer)
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def export(
    run: Annotated[Path, typer.Argument(help="Run folder, finished or not.")],
    out: Annotated[Path, typer.Option(help="New folder for the policy.")],
    adapter: Annotated[
        Path | None, typer.Option(help="New folder for what LoRA trained alone, as peft reads it; --out is merged.")
    ] = None,
    dtype: Annotated[ExportDtype | None, typer.Option(help="Of the weights; by default the run's own.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB or 2GiB.")] = "5GB",
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the folder back: digests, and log-probs of rollouts of the run.")
    ] = False,
) -> None:
    """Exports the newest checkpoint of a run as a Hugging Face folder."""
    with clear_errors("export again"):
        from rl.export import export_adapter, export_run, parse_bytes
        from rl.export_check import verify_export

        if adapter:
            step = export_adapter(run, adapter)
            console.print(f"adapter after {step} steps in {adapter}", highlight=False, soft_wrap=True)
        digest, step = export_run(run, out, dtype, parse_bytes(max_shard_size))
        console.print(f"policy after {step} steps in {out}, weights digest {digest}", highlight=False, soft_wrap=True)
        if verify:
            console.print(f"verified: {verify_export(run, out)}", highlight=False, soft_wrap=True)
