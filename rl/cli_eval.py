"""Commands that measure policies: eval and compare-eval. They run in this process, without Ray."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rl.cli_support import PolicyArgument, Seed, clear_errors, console


@dataclass(frozen=True)
class Protocol:
    """How completions are sampled; max_new_tokens None is all that the policy's positions leave room for."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int | None


# 64 samples, temperature 0.6 and top_p 1 are what the AIME scores of the Ring-linear report (arXiv 2510.19338) were
# taken with; how long an answer may be it does not say.
PRESETS = {None: Protocol(8, 1.0, 1.0, 96), "aime": Protocol(64, 0.6, 1.0, None)}


def eval_policy(
    policy: PolicyArgument,
    data: Annotated[
        str | None, typer.Option(help="Problems: a .jsonl, .json or .parquet file, a dataset name, or synthetic.")
    ] = None,
    preset: Annotated[
        Literal["aime"] | None,
        typer.Option(help="aime: 64 samples, temperature 0.6, top_p 1, as many tokens as the policy has room for."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Completions for each problem [default: 8].")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy [default: 1].")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus that is sampled from; 1 is off [default: 1].")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest completion, in tokens [default: 96].")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the result here, all completions beside it; a killed evaluation goes on."),
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write an HTML page too; needs --json.")] = None,
    max_problems: Annotated[int, typer.Option(min=1, help="At most the first so many problems.")] = 1000,
    seed: Seed = 0,
    max_batch: Annotated[int, typer.Option(min=1, help="Most completions sampled at once; changes no result.")] = 256,
    memory_mb: Annotated[int, typer.Option(min=1, help="MiB for the engine's cache; changes no result.")] = 512,
    decay_text: Annotated[
        Path | None,
        typer.Option(
            "--compare-decay", metavar="TEXTFILE", help="Instead: which decay convention fits this text better."
        ),
    ] = None,
) -> None:
    """Scores a policy on problems with known answers: avg@k, pass@k, cons@k.

    Values that are given replace those of a preset.
    """
    with clear_errors("with --json, the same command goes on where it stopped"):
        if (data is None) == (decay_text is None):
            raise ValueError("give either --data with problems to solve, or --compare-decay with a text to score")
        if decay_text is not None:
            _print_decay_comparison(policy, decay_text)
            return
        assert data is not None
        _require_places(json_file, page)
        from rl.eval_journal import completions_path
        from rl.eval_page import write_evaluation_page
        from rl.eval_policy import EvaluationSettings, evaluate_policy
        from rl.eval_table import evaluation_table, problem_table

        given = {"samples": samples, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        protocol = asdict(replace(PRESETS[preset], **changes))
        engine = {"max_batch": max_batch, "memory_mb": memory_mb}
        settings = EvaluationSettings(policy, data, max_problems=max_problems, seed=seed, **engine, **protocol)
        result = evaluate_policy(settings, json_file, console)
        console.print(evaluation_table(str(policy), data, result))
        console.print(problem_table(result))
        if json_file and page:
            write_evaluation_page(page, result, completions_path(json_file))


def _print_decay_comparison(policy: Path, text_file: Path) -> None:
    from rl.compare_decay import compare_decay
    from rl.export import policy_folder

    report = compare_decay(policy_folder(policy), text_file)
    console.print(report, highlight=False, markup=False, soft_wrap=True)


def _require_places(json_file: Path | None, page: Path | None) -> None:
    if page and not json_file:
        raise ValueError(f"--page {page} shows the completions that --json keeps beside its file; give --json too")
    for path in (json_file, page):
        if path and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}; make it first")


def compare_eval(
    first: Annotated[Path, typer.Argument(help="What `lockstep eval --json` wrote of one policy.")],
    second: Annotated[Path, typer.Argument(help="The same of another policy, on the same problems.")],
) -> None:
    """Compares two policies problem by problem: difference of avg@k, interval, paired test."""
    with clear_errors():
        from rl.eval_compare import comparison_table

        console.print(comparison_table((first, second)))
