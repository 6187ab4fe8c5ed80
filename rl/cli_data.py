"""Commands on problem sets: lockstep data make, check, list, pass-rates."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rl.cli_support import PolicyArgument, Seed, clear_errors, console

if TYPE_CHECKING:
    from rl.data_columns import Row

data_app = typer.Typer(no_args_is_help=True, help="Make, check, list and rate problem sets.")
Source = Annotated[str, typer.Argument(help="A .jsonl, .json or .parquet file, or a dataset name.")]
HITS_SHOWN = 1000


@data_app.command("make")
def make(
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    count: Annotated[int, typer.Option(min=1)] = 100,
    split: Annotated[str, typer.Option(help="train or eval; the two never share a problem.")] = "train",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    difficulty: Annotated[int, typer.Option(min=1, max=3)] = 1,
) -> None:
    """Writes AIME-style problems with answers and worked solutions."""
    with clear_errors():
        from rl.data import write_jsonl
        from rl.problems import FAMILIES, generate

        if split not in ("train", "eval"):
            raise ValueError(f"--split {split}: must be train or eval")
        problems = generate("train" if split == "train" else "eval", count, seed, difficulty, FAMILIES)
        write_jsonl(problems, out)
        console.print(f"{len(problems)} problems written to {out}", highlight=False, soft_wrap=True)


@data_app.command("check")
def check(
    source: Source,
    against: Annotated[
        str | None, typer.Option(help="An evaluation set, none of whose problems should occur in this one.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy whose prompts of the problems are counted, and the first one shown.")
    ] = None,
) -> None:
    """Lists what a run would make of a problem set, and every bad row; exits with 1 when there is one.

    With --against it also lists every problem of the evaluation set that occurs in this set, which exits with 1 too.
    """
    with clear_errors():
        from rl.data import check_report
        from rl.data_sources import load_rows
        from rl.duplicates import contamination_report, find_contamination

        rows, bad = load_rows(source)
        console.print(check_report(source, rows, bad), highlight=False, markup=False, soft_wrap=True)
        if policy and rows:
            console.print(_prompt_report(rows, policy), highlight=False, markup=False, soft_wrap=True)
        held_out, unread = load_rows(against, "eval") if against else ([], [])
        if unread:
            raise ValueError(f"{against}: {len(unread)} rows cannot be used, so not all is checked; first {unread[0]}")
        hits = list(find_contamination(rows, held_out))
        if against:
            report = contamination_report(hits, HITS_SHOWN) if hits else "none of its problems occurs here"
            console.print(f"against {against}: {report}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1 if bad or not rows or hits else 0)


def _prompt_report(rows: list["Row"], policy: Path) -> str:
    from policy.tokenizer import load_tokenizer
    from rl.export import policy_folder, prompt_config, read_manifest
    from rl.prompts import encode, uses_chat

    folder = policy_folder(policy)
    config, tokenizer = prompt_config(read_manifest(folder)), load_tokenizer(folder)
    prompts = encode(rows, config, tokenizer)
    lengths = [len(ids) for _, ids in prompts]
    form = "chats" if uses_chat(config, tokenizer) else "plain text"
    return f"prompts: {form} of {min(lengths)} to {max(lengths)} tokens; the first is {prompts[0][0]!r}"


@data_app.command("list")
def list_known() -> None:
    """Lists the datasets that have a short name, usable wherever a dataset is named."""
    with clear_errors():
        from rl.known_datasets import known_table

        console.print(known_table())
        console.print("NAME is the dataset on the hub, NAME:SPLIT another split, NAME@FOLDER a copy of it.")


@data_app.command("pass-rates")
def pass_rates(
    policy: PolicyArgument,
    data: Annotated[str, typer.Option(help="Problems: a .jsonl, .json or .parquet file, or a dataset name.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write: the problems, each with its pass_rate.")],
    samples: Annotated[int, typer.Option(min=1, help="Completions for each problem.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 96,
    seed: Seed = 0,
    max_batch: Annotated[int, typer.Option(min=1, help="Most completions sampled at once; changes no result.")] = 256,
    memory_mb: Annotated[int, typer.Option(min=1, help="MiB for the engine's cache; changes no result.")] = 512,
) -> None:
    """Measures how often a policy solves each problem, for data.filters.pass_rate and data.curriculum_stages."""
    with clear_errors("the same command goes on where it stopped"):
        from rl.eval_policy import EvaluationSettings
        from rl.pass_rates import measure_pass_rates, pass_rate_summary

        settings = EvaluationSettings(
            policy=policy,
            data=data,
            samples=samples,
            temperature=temperature,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            max_problems=10**9,
            seed=seed,
            max_batch=max_batch,
            memory_mb=memory_mb,
        )
        records = measure_pass_rates(settings, out, console)
        console.print(pass_rate_summary(records, out), highlight=False, soft_wrap=True)
