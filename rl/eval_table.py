"""An evaluation in words: the lines that the console, the page and the report of a run show of its result."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from rl.eval_scores import average_name, score_names

MAX_PROBLEMS_PRINTED = 40
MAX_ANSWER_CHARACTERS = 40


def evaluation_lines(result: Mapping[str, Any]) -> dict[str, str]:
    """What is said of a result, by label; its families apart."""
    scores = {name: _score(result, name) for name in score_names(result)}
    lengths = {
        f"length, {which}": "mean {mean:,.1f}, p50 {p50:,.0f}, p90 {p90:,.0f}, max {max:,}".format_map(found)
        for which, found in result["length"].items()
        if found
    }
    failures = result["verifier_failures"]
    return {
        **scores,
        "problems x samples": f"{result['problems']:,} x {result['samples']:,}",
        "sampling": f"temperature {result['temperature']}, top_p {result['top_p']}, at most "
        f"{result['max_new_tokens']:,} tokens, seed {result['seed']}",
        **lengths,
        "truncated": f"{result['truncated_fraction']:.1%} of the completions",
        "no answer": f"{result['no_answer_fraction']:.1%} of the completions",
        "verifier failures": f"{failures:,}" + (", counted as wrong" if failures else ""),
    }


def _score(result: Mapping[str, Any], name: str) -> str:
    low, high = result["ci95"][name]
    return f"{result[name]:.4f} (95% interval {low:.4f} to {high:.4f})"


def evaluation_table(policy: str, data: str, result: Mapping[str, Any]) -> Table:
    """The result as `lockstep eval` prints it."""
    average = average_name(result)
    families = {f"{average}, {name}": f"{value:.4f}" for name, value in result["by_family"].items()}
    return two_columns(f"{policy} on {data}", {**evaluation_lines(result), **families})


def two_columns(title: str, lines: Mapping[str, str]) -> Table:
    """A titled table of labels and values."""
    # Text, because a path or a name with [brackets] would be read as rich markup.
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in lines.items():
        table.add_row(Text(label), Text(value))
    return table


def problem_table(result: Mapping[str, Any]) -> Table:
    """The first problems, one a row; a caption says when there are more."""
    rows = result["rows"]
    left_out = len(rows) - MAX_PROBLEMS_PRINTED
    caption = f"and {left_out:,} more: --json writes them all" if left_out > 0 else None
    table = Table(caption=caption)
    for header in ("problem", "right", "tokens", "truncated", "no answer", "majority", "answer"):
        table.add_column(header, overflow="fold")
    for row in rows[:MAX_PROBLEMS_PRINTED]:
        table.add_row(*map(Text, _cells(row)))
    return table


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    verdict = "right" if row["majority_correct"] else "wrong"
    return (
        shortened(row["id"]),
        f"{row['correct']} of {row['samples']}",
        f"{row['mean_length']:,.1f}",
        str(row["truncated"]),
        str(row["no_answer"]),
        "-" if row["majority"] is None else f"{shortened(row['majority'])} ({verdict})",
        shortened(row["answer"]),
    )


def shortened(answer: str) -> str:
    """One line of an answer, cut where a policy made it long; what a terminal or a browser would act on is replaced."""
    line = " ".join(answer.split())
    shown = "".join(character if character.isprintable() else "\ufffd" for character in line[:MAX_ANSWER_CHARACTERS])
    return shown if len(line) <= MAX_ANSWER_CHARACTERS else shown[:-1] + "…"
