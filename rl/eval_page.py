"""The page of an evaluation: its scores, every problem with its verdicts, and some of the completions."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rl.eval_problem import Graded, ProblemResult
from rl.eval_scores import average_name, pass_at_k, score_names
from rl.eval_table import evaluation_lines, shortened
from rl.page import write_page
from rl.report.rollouts import cut
from rl.report.svg import Chart, Point, Series

MAX_TEXTS = 512  # completions of the whole page that are shown with their text; but one of each problem always is
MAX_TEXTS_OF_PROBLEM = 8
MAX_BINS = 40


@dataclass(frozen=True)
class ShownCompletion:
    """A completion as shown: its sample number, its verdict, and its text, cut where it is long."""

    sample: int
    graded: Graded
    answer: str
    text: str


@dataclass(frozen=True)
class ShownProblem:
    """A problem as shown. `verdicts` has a (CSS class, tooltip) for every completion."""

    row: Mapping[str, Any]
    problem: str
    answer: str
    majority: str
    verdicts: list[tuple[str, str]]
    completions: list[ShownCompletion]


def write_evaluation_page(path: Path, result: Mapping[str, Any], completions: Path) -> None:
    """Writes one HTML page that needs nothing else.

    result: what `lockstep eval --json` writes. completions: the file beside it, read one problem at a time.
    """
    texts = max(1, min(MAX_TEXTS_OF_PROBLEM, MAX_TEXTS // result["problems"]))
    lengths: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    shown = []
    for problem, row in zip(_read(completions), result["rows"], strict=True):
        for each in problem.completions:
            lengths[each.correct][each.length] += 1
        shown.append(_problem(problem, row, texts))
    write_page(
        path,
        "eval_template.html",
        styles=["eval_page.css"],
        result=result,
        average=average_name(result),
        scores=_headline(result),
        lines=evaluation_lines(result),
        charts=[_pass_chart(result), _length_chart(lengths)],
        problems=shown,
        texts=texts,
        completions_file=completions.name,
    )


def _headline(result: Mapping[str, Any]) -> list[tuple[str, float, tuple[float, float]]]:
    """(name, value, interval) of the scores that use all samples: avg, pass and cons at k = n."""
    names = [name for name in score_names(result) if name.endswith(f"@{result['samples']}")]
    return [(name, result[name], result["ci95"][name]) for name in names]


def _read(completions: Path) -> Iterator[ProblemResult]:
    with completions.open("rb") as file:
        yield from (ProblemResult.from_json(json.loads(line)) for line in file)


def _problem(problem: ProblemResult, row: Mapping[str, Any], texts: int) -> ShownProblem:
    return ShownProblem(
        row=row,
        problem=cut(problem.row.problem),
        answer=shortened(row["answer"]),
        majority="-" if row["majority"] is None else shortened(row["majority"]),
        verdicts=[_verdict(sample, each) for sample, each in enumerate(problem.completions)],
        completions=[
            ShownCompletion(sample, each, _answer(each), cut(each.text))
            for sample, each in _chosen(problem.completions, texts)
        ],
    )


def _chosen(completions: tuple[Graded, ...], count: int) -> list[tuple[int, Graded]]:
    """The first completions by sample number, with at least a right and a wrong one where there are both."""
    numbered = list(enumerate(completions))
    first = {each.correct: sample for sample, each in reversed(numbered)}
    by_interest = sorted(numbered, key=lambda pair: (first[pair[1].correct] != pair[0], pair[0]))
    return sorted(by_interest[:count], key=lambda pair: pair[0])


def _verdict(sample: int, each: Graded) -> tuple[str, str]:
    css = "right" if each.correct else "cut" if each.truncated else "none" if each.extracted is None else "wrong"
    return css, f"sample {sample}: {_answer(each)}, {each.reason}, {each.length:,} tokens, {each.finish_reason}"


def _answer(each: Graded) -> str:
    return "no answer" if each.extracted is None else shortened(each.extracted)


def _pass_chart(result: Mapping[str, Any]) -> Chart:
    """pass@k for every k, from the counts of right completions."""
    n = result["samples"]
    points: list[Point] = [
        (float(k), float(np.mean([pass_at_k(n, row["correct"], k) for row in result["rows"]]))) for k in range(1, n + 1)
    ]
    series = [Series("pass@k", points)]
    return Chart("pass@k", "unbiased, k from 1 to the number of samples", series, x_name="k")


def _length_chart(lengths: Mapping[bool, Counter[int]]) -> Chart:
    """Completions by length, in bins of equal width, named by their upper end."""
    longest = max(max(counts, default=0) for counts in lengths.values())
    width = max(1, math.ceil(longest / MAX_BINS))
    ends = range(width, longest + width, width)
    series = [
        Series(name, [(float(end), float(_between(lengths[correct], end - width, end))) for end in ends])
        for name, correct in (("right", True), ("wrong", False))
    ]
    unit = f"completions, by tokens in steps of {width}"
    return Chart("Length", unit, series, kind="area", x_name="tokens up to")


def _between(counts: Counter[int], above: int, up_to: int) -> int:
    return sum(count for length, count in counts.items() if above < length <= up_to)
