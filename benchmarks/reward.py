"""Verified completions per second: the reward pool with one worker against bare math-verify, each on one core.

    python -m benchmarks.reward [--out FOLDER] [--quick]

Ordinary completions, some right and some wrong: a few sentences and a boxed answer, eight to a problem. `aime` holds
integers. `math` holds half integers, the rest fractions, radicals, polynomials, pairs and choices.

math-verify runs in this process without a time limit, as its documentation shows: `verify(parse(gold), parse(text))`.
The pool parses symbolic answers in a process that it can kill. The runs alternate; the ratio is that of the medians.
The result is written to reward.json.
"""

import dataclasses
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from math_verify import parse, verify

from benchmarks.common import alternate, arguments, rates, write_result
from reward.config import RewardConfig
from reward.pool import RewardPool

PROSE = "Let us write the condition as an equation in $x$ and $y$. Since $x + y = 10$, we have $y = 10 - x$. " * 4
LETTERS = "ABCDE"
SIDES = ("lockstep", "math_verify")

# A gold answer, and what a policy may write for it: right ones first.
Problem = tuple[str, list[str]]


def integer(rng: random.Random) -> Problem:
    value = rng.randrange(1000)
    return str(value), [f"{value}", f"{value:03d}", f"x = {value}", f"{value + 1}", f"{value}0"]


def fraction(rng: random.Random) -> Problem:
    top, bottom = rng.randrange(1, 50), rng.randrange(51, 99)
    return f"\\frac{{{top}}}{{{bottom}}}", [f"\\dfrac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", f"{bottom}/{top}"]


def radical(rng: random.Random) -> Problem:
    factor, root = rng.randrange(2, 50), rng.choice([2, 3, 5, 7, 11])
    return f"{factor}\\sqrt{{{root}}}", [
        f"\\sqrt{{{factor**2 * root}}}",
        f"{factor} \\sqrt{root}",
        f"\\sqrt{{{factor}}}",
    ]


def polynomial(rng: random.Random) -> Problem:
    a, b = rng.randrange(2, 50), rng.randrange(2, 50)
    return f"x^2 + {a + b}x + {a * b}", [f"(x+{a})(x+{b})", f"x^2+{a + b}x+{a * b}", f"x^2 + {a}x + {b}"]


def pair(rng: random.Random) -> Problem:
    a, b = rng.randrange(50), rng.randrange(50, 99)
    return f"({a}, {b})", [f"({a},{b})", f"\\left({a}, {b}\\right)", f"({b}, {a})"]


def choice(rng: random.Random) -> Problem:
    letter = rng.choice(LETTERS)
    return letter, [letter, f"\\text{{({letter})}}", f"({LETTERS[LETTERS.index(letter) - 1]})"]


Kind = Callable[[random.Random], Problem]
MIXES: dict[str, dict[Kind, int]] = {
    "aime": {integer: 1},
    "math": {integer: 10, fraction: 3, radical: 2, polynomial: 2, pair: 2, choice: 1},
}


@dataclass(frozen=True)
class Load:
    problems: int = 250
    samples: int = 8
    repeats: int = 5

    @property
    def completions(self) -> int:
        return self.problems * self.samples


QUICK = Load(problems=4, samples=2, repeats=2)


def completions(mix: dict[Kind, int], load: Load) -> list[tuple[str, str]]:
    """(completion, gold) pairs, the samples of a problem in a row."""
    rng = random.Random(0)
    pairs = []
    for _ in range(load.problems):
        gold, answers = rng.choices(list(mix), list(mix.values()))[0](rng)
        pairs += [(f"{PROSE}So the answer is $\\boxed{{{rng.choice(answers)}}}$.", gold) for _ in range(load.samples)]
    return pairs


def math_verify_score(completion: str, gold: str) -> float:
    parsed = parse(f"${gold}$", parsing_timeout=None), parse(completion, parsing_timeout=None)
    return float(verify(*parsed, timeout_seconds=None))


def measure(mix: dict[Kind, int], load: Load, pool: RewardPool) -> dict[str, Any]:
    pairs = completions(mix, load)
    theirs = [math_verify_score(*each) for each in pairs]
    ours = [result.score for result in pool.score(pairs)]
    our_seconds, their_seconds = alternate(
        lambda: pool.score(pairs), lambda: [math_verify_score(*each) for each in pairs], load.repeats
    )
    our_rates, their_rates = rates(load.completions, our_seconds), rates(load.completions, their_seconds)
    return {
        "lockstep": {"completions_per_second": our_rates},
        "math_verify": {"completions_per_second": their_rates},
        "ratio": our_rates["median"] / their_rates["median"],
        "same_score": sum(one == other for one, other in zip(ours, theirs, strict=True)) / len(pairs),
    }


def main() -> None:
    args = arguments(__doc__)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limit is off
    load = QUICK if args.quick else Load()
    with RewardPool(RewardConfig()) as pool:
        results = {name: measure(mix, load, pool) for name, mix in MIXES.items()}
    record = {"load": dataclasses.asdict(load), "math_verify_version": version("math-verify"), **results}
    path = write_result(args, "reward", record)
    for name, result in results.items():
        sides = [f"{side} {result[side]['completions_per_second']['median']:.0f}" for side in SIDES]
        shared = f"ratio {result['ratio']:.1f}, same score {result['same_score']:.1%}"
        print(f"{name}: {', '.join(sides)} completions/s, {shared}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
