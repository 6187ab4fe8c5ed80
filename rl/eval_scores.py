"""The statistics of an evaluation: avg@k, pass@k, cons@k with intervals over problems, lengths, and a paired test."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rl.eval_problem import ProblemResult, majority

BOOTSTRAP_DRAWS = 1000
AVERAGE = "avg@"
SCORES = (AVERAGE, "pass@", "cons@")


def score_names(result: Mapping[str, Any]) -> list[str]:
    """The scores among the keys of an evaluation's result: ["avg@8", "pass@2", ..., "cons@8"]."""
    return [name for name in result if name.startswith(SCORES)]


def average_name(result: Mapping[str, Any]) -> str | None:
    """The key of the main score, such as "avg@8" for 8 samples a problem; None where there is no evaluation."""
    return next((name for name in result if name.startswith(AVERAGE)), None)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k completions is right (Chen et al., 2107.03374 Eq. 1)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def scores(problems: Sequence[ProblemResult], seed: int) -> dict[str, Any]:
    """Every score by name, and under `ci95` its interval: (low, high) of a bootstrap over problems.

    With n samples a problem: avg@n, the mean over problems of the share of right completions; pass@k for k = 2, 4, 8
    ... below n and for n; cons@n, the share of problems whose majority answer is right.
    """
    by_problem = {name: np.array(values) for name, values in _by_problem(problems).items()}
    means = {name: float(values.mean()) for name, values in by_problem.items()}
    return means | {"ci95": {name: bootstrap_interval(values, seed) for name, values in by_problem.items()}}


def _by_problem(problems: Sequence[ProblemResult]) -> dict[str, list[float]]:
    n = len(problems[0].completions)
    correct = [problem.correct for problem in problems]
    winners = [majority(problem.completions) for problem in problems]
    return {
        f"{AVERAGE}{n}": [count / n for count in correct],
        **{f"pass@{k}": [pass_at_k(n, count, k) for count in correct] for k in pass_sizes(n)},
        f"cons@{n}": [float(winner is not None and winner.correct) for winner in winners],
    }


def pass_sizes(n: int) -> list[int]:
    """The k of pass@k that n samples are reported for. pass@1 is avg@n, so it is not among them."""
    return sorted({k for k in (1 << power for power in range(1, n.bit_length())) if k <= n} | {n} - {1})


def bootstrap_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95% percentile interval of the mean of values, FP64 [problems], under resampling of the problems."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    draws = generator.integers(len(values), size=(BOOTSTRAP_DRAWS, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def length_statistics(problems: Iterable[ProblemResult]) -> dict[str, dict[str, float] | None]:
    """Mean, median, 90th percentile and maximum in tokens: of all completions, of right and of wrong ones."""
    pairs = [(each.length, each.correct) for problem in problems for each in problem.completions]
    return {
        "all": _length_summary([length for length, _ in pairs]),
        "correct": _length_summary([length for length, correct in pairs if correct]),
        "incorrect": _length_summary([length for length, correct in pairs if not correct]),
    }


def _length_summary(lengths: list[int]) -> dict[str, float] | None:
    if not lengths:
        return None
    p50, p90 = np.quantile(lengths, [0.5, 0.9])
    return {"mean": float(np.mean(lengths)), "p50": float(p50), "p90": float(p90), "max": max(lengths)}


def sign_flip_p_value(differences: Sequence[int]) -> float:
    """Two-sided paired permutation test: the chance of a sum this far from 0 if each difference had a random sign.

    Exact for any number of differences: it follows the distribution of the sum from one difference to the next,
    instead of drawing signs.
    """
    sizes = [abs(difference) for difference in differences if difference]
    unit = math.gcd(*sizes) or 1
    reach = sum(sizes) // unit
    chance = np.zeros(2 * reach + 1)  # of each sum from -reach to reach
    chance[reach] = 1.0
    for size in sizes:
        chance = (np.roll(chance, size // unit) + np.roll(chance, -size // unit)) / 2
    as_far = np.abs(np.arange(-reach, reach + 1)) >= abs(sum(differences)) // unit
    return min(1.0, float(chance[as_far].sum()))
