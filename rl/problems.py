"""Synthetic AIME-style problems: integer answers from 0 to 999, with worked solutions that may slip.

A family is one or more `Kind`s; a kind is a sentence with operands, the calculation as a list of steps, and the operand
ranges of each difficulty. One table (`KINDS`) holds them all. A solution is the steps written out:

    Find the remainder when 7*8+5 is divided by 9.
    7*8=56. 56+5=61. 61=6*9+7. The remainder is \\boxed{7}.

A solution that slips has one wrong step, is right from there on, and ends in a wrong answer; nothing in its form gives
it away. Warm start on such solutions leaves a policy that is often wrong, which is what reinforcement needs.

Train and eval are disjoint by construction: a hash of a problem's kind and operands decides its split, whatever the
seed and the difficulty.
"""

import functools
import hashlib
import itertools
import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "eval"]
DIFFICULTIES = (1, 2, 3)
MAX_ANSWER = 999
EVAL_ONE_IN = 5


@dataclass(frozen=True)
class Problem:
    """A problem as the policy sees it, its answer (an integer in 0..999, no leading zeros) and a right solution."""

    problem: str
    answer: str
    solution: str
    family: str
    id: str


@dataclass(frozen=True)
class Step:
    """`result = left symbol right`; an operand is a name or a number. `//` keeps the quotient, `%` the remainder."""

    result: str
    left: str
    symbol: str
    right: str


@dataclass(frozen=True)
class Kind:
    """One form of problem. `ranges[difficulty]` maps each operand's name to the values it takes."""

    name: str
    family: str
    text: str
    steps: tuple[Step, ...]
    closing: str
    ranges: Mapping[int, Mapping[str, range]]


@dataclass(frozen=True)
class Instance:
    """A kind with its operands filled in: everything that determines a problem, in little memory."""

    kind: Kind
    operands: tuple[int, ...]

    @property
    def names(self) -> dict[str, int]:
        """Operand values by name, in the order of the kind's ranges."""
        ranges = next(iter(self.kind.ranges.values()))
        return dict(zip(ranges, self.operands, strict=True))

    @property
    def id(self) -> str:
        return "-".join([self.kind.name, *map(str, self.operands)])

    @property
    def split(self) -> Split:
        """Operands are sorted before hashing, so that 7*8+5 and its mirror image 8*7+5 fall on the same side."""
        canonical = f"{self.kind.name}:{sorted(self.operands)}"
        bucket = int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big")
        return "eval" if bucket % EVAL_ONE_IN == 0 else "train"


def _steps(text: str) -> tuple[Step, ...]:
    """Read steps written as "x=a*b y=x+c"."""
    found = [re.fullmatch(r"(\w+)=(\w+)(//|[-+*/%])(\w+)", step) for step in text.split()]
    assert all(found), f"unreadable steps {text!r}"
    return tuple(Step(*match.groups()) for match in found if match)


def _span(first: int, last: int, stride: int = 1) -> range:
    return range(first, last + 1, stride)


_DIGIT = _span(2, 9)

KINDS: tuple[Kind, ...] = (
    Kind(
        name="remainder",
        family="remainder",
        text="Find the remainder when {a}*{b}+{c} is divided by {d}.",
        steps=_steps("x=a*b y=x+c z=y%d"),
        closing="The remainder is",
        ranges={
            1: {"a": _DIGIT, "b": _span(2, 4), "c": _span(1, 9), "d": _span(3, 5)},
            2: {"a": _span(13, 39), "b": _span(3, 9), "c": _span(10, 39), "d": _span(3, 9)},
        },
    ),
    Kind(
        name="remainder_nested",
        family="remainder",
        text="Find the remainder when ({a}*{b}+{c})*{d}+{e} is divided by {f}.",
        steps=_steps("v=a*b w=v+c x=w*d y=x+e z=y%f"),
        closing="The remainder is",
        ranges={
            3: {
                "a": _span(3, 9),
                "b": _span(3, 9),
                "c": _span(1, 9),
                "d": _span(2, 4),
                "e": _span(1, 9, 2),
                "f": _span(3, 9),
            }
        },
    ),
    Kind(
        name="rows",
        family="arithmetic",
        text="A box holds {a} rows of {b} coins. {c} coins are added. How many coins are there?",
        steps=_steps("x=a*b y=x+c"),
        closing="The total is",
        ranges={
            1: {"a": _DIGIT, "b": _DIGIT, "c": _span(1, 9)},
            2: {"a": _span(13, 40), "b": _span(3, 9), "c": _span(20, 99)},
        },
    ),
    Kind(
        name="bags",
        family="arithmetic",
        text="Ann has {a} bags of {b} nuts and {c} bags of {d} nuts. How many nuts does she have?",
        steps=_steps("x=a*b y=c*d z=x+y"),
        closing="The total is",
        ranges={
            1: {"a": _span(2, 5), "b": _span(2, 5), "c": _span(2, 5), "d": _span(2, 5)},
            2: {"a": _span(13, 29), "b": _span(3, 9), "c": _span(13, 29), "d": _span(3, 9)},
        },
    ),
    Kind(
        name="boxes",
        family="arithmetic",
        text="Each of {a} boxes holds {b} rows of {c} coins and {d} more. {e} coins are lost. How many are left?",
        steps=_steps("w=b*c x=w+d y=a*x z=y-e"),
        closing="The total is",
        ranges={3: {"a": _DIGIT, "b": _DIGIT, "c": _DIGIT, "d": _span(1, 9), "e": _span(2, 9)}},
    ),
    Kind(
        name="multiples",
        family="counting",
        text="How many multiples of {a} are there from 1 to {b}?",
        steps=_steps("x=b//a"),
        closing="The count is",
        ranges={
            1: {"a": _span(3, 5), "b": _span(10, 45)},
            2: {"a": _DIGIT, "b": _span(100, 999)},
        },
    ),
    Kind(
        name="multiples_between",
        family="counting",
        text="How many multiples of {a} are there from {b} to {c}?",
        steps=_steps("w=c//a x=b-1 y=x//a z=w-y"),
        closing="The count is",
        ranges={3: {"a": _DIGIT, "b": _span(11, 99, 4), "c": _span(100, 299, 4)}},
    ),
    Kind(
        name="roads",
        family="counting",
        text="{a} roads join A to B, {b} join B to C and {c} join A to C. How many routes go from A to C?",
        steps=_steps("x=a*b y=x+c"),
        closing="The count is",
        ranges={
            1: {"a": _DIGIT, "b": _DIGIT, "c": _span(2, 9)},
            2: {"a": _span(13, 40), "b": _span(3, 9), "c": _span(10, 50)},
        },
    ),
    Kind(
        name="roads_twice",
        family="counting",
        text="{a} roads join A to B, {b} B to C, {c} C to D and {d} A to D. How many routes go from A to D?",
        steps=_steps("x=a*b y=x*c z=y+d"),
        closing="The count is",
        ranges={3: {"a": _DIGIT, "b": _DIGIT, "c": _DIGIT, "d": _span(2, 20)}},
    ),
    Kind(
        name="term",
        family="sequences",
        text="An arithmetic sequence has first term {a} and difference {d}. Find term {n}.",
        steps=_steps("x=n-1 y=x*d z=a+y"),
        closing="The term is",
        ranges={
            1: {"a": _span(1, 12), "d": _DIGIT, "n": _span(3, 10)},
            2: {"a": _span(10, 60), "d": _span(13, 39), "n": _span(4, 10)},
        },
    ),
    Kind(
        name="series",
        family="sequences",
        text="An arithmetic sequence has first term {a} and difference {d}. Add its first {n} terms.",
        steps=_steps("u=n-1 v=u*d w=a+v x=a+w y=x*n z=y/2"),
        closing="The sum is",
        ranges={3: {"a": _span(1, 30), "d": _DIGIT, "n": _span(4, 10)}},
    ),
)
_OPERATORS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
    "//": operator.floordiv,
    "%": operator.mod,
}
FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(kind.family for kind in KINDS))


def _apply(left: int, symbol: str, right: int) -> int | None:
    """The step's right result; None where it is no whole number or is negative."""
    if symbol == "/" and left % right:
        return None
    value = _OPERATORS[symbol](left, right)
    return value if value >= 0 else None


def _run(instance: Instance, slips: Mapping[str, int]) -> dict[str, int] | None:
    """Values of the operands and of every step; a step named in `slips` takes that value, and later steps use it.

    None where a step has no result, or the answer leaves 0..999.
    """
    values = instance.names
    for step in instance.kind.steps:
        value = _apply(_value(step.left, values), step.symbol, _value(step.right, values))
        if value is None:
            return None
        values[step.result] = slips.get(step.result, value)
    return values if values[instance.kind.steps[-1].result] <= MAX_ANSWER else None


def _value(operand: str, values: Mapping[str, int]) -> int:
    return int(operand) if operand.isdigit() else values[operand]


def _written(step: Step, values: Mapping[str, int]) -> str:
    """The step as text: "7*8=56", or "61=6*9+7" for a division with remainder."""
    left, right, result = _value(step.left, values), _value(step.right, values), values[step.result]
    if step.symbol == "//":
        return f"{left}={result}*{right}+{left % right}"
    if step.symbol == "%":
        return f"{left}={left // right}*{right}+{result}"
    return f"{left}{step.symbol}{right}={result}"


def _slip(value: int, rng: random.Random) -> int:
    """A plausible wrong result: off by 1, 2 or 10, or with one digit replaced."""
    if rng.random() < 0.75:
        return value + rng.choice((-10, -2, -1, 1, 2, 10))
    digits = list(str(value))
    digits[rng.randrange(len(digits))] = rng.choice("0123456789")
    return int("".join(digits))


def _draw_slipped(instance: Instance, right: Mapping[str, int], rng: random.Random) -> dict[str, int]:
    """Values with one slip, drawn until the slip is plausible and the answer comes out wrong.

    Some slip always does: the last step off by one is wrong whatever the problem.
    """
    answer = instance.kind.steps[-1].result
    while True:
        step = rng.choice(instance.kind.steps)
        wrong = _slip(right[step.result], rng)
        limit = _value(step.right, right) if step.symbol == "%" else wrong + 1
        values = _run(instance, {step.result: wrong}) if 0 <= wrong < limit else None
        if values is not None and values[answer] != right[answer]:
            return values


def worked_solution(instance: Instance, rng: random.Random, slip: bool) -> str:
    """The steps of `instance` written out and its answer in \\boxed{}; with `slip`, one step is wrong and so is the
    answer, and the steps after the slip follow from it."""
    values = _run(instance, {})
    assert values is not None, f"{instance.id} has no answer: the ranges of its kind are wrong"
    if slip:
        values = _draw_slipped(instance, values, rng)
    lines = [_written(step, values) for step in instance.kind.steps]
    answer = values[instance.kind.steps[-1].result]
    return f"{'. '.join(lines)}. {instance.kind.closing} \\boxed{{{answer}}}."


@functools.lru_cache(maxsize=64)
def _space(family: str, difficulty: int, split: Split) -> tuple[Instance, ...]:
    """Every problem of a family, difficulty and split, in a fixed order."""
    kinds = [kind for kind in KINDS if kind.family == family and difficulty in kind.ranges]
    instances = (
        Instance(kind, operands) for kind in kinds for operands in itertools.product(*kind.ranges[difficulty].values())
    )
    return tuple(each for each in instances if each.split == split and _run(each, {}) is not None)


def check_families(families: Sequence[str]) -> None:
    """Raise ValueError unless `families` are distinct, known, and at least one."""
    unknown = [family for family in families if family not in FAMILIES]
    if unknown or not families or len(set(families)) < len(families):
        raise ValueError(f"families = {list(families)}: give one or more of {', '.join(FAMILIES)}, each once")


def _check_difficulty(difficulty: int) -> None:
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty = {difficulty}: must be one of {', '.join(map(str, DIFFICULTIES))}")


def _problem(instance: Instance) -> Problem:
    solution = worked_solution(instance, random.Random(0), slip=False)
    answer = solution.rpartition("{")[2].removesuffix("}.")
    text = instance.kind.text.format(**instance.names)
    return Problem(text, answer, solution, instance.kind.family, instance.id)


def _draw(family: str, split: Split, count: int, difficulty: int, rng: random.Random) -> list[Problem]:
    space = _space(family, difficulty, split)
    if count > len(space):
        raise ValueError(
            f"{count} {split} problems wanted from family {family!r} at difficulty {difficulty}, which has "
            f"{len(space)}: ask for fewer, add families or raise the difficulty"
        )
    return [_problem(instance) for instance in rng.sample(space, count)]


def generate(split: Split, count: int, seed: int, difficulty: int, families: Sequence[str]) -> list[Problem]:
    """`count` distinct problems in mixed order, in equal shares of `families` (the first ones take what is left over).

    The same arguments give the same problems on every machine. Raises ValueError for an unknown family or difficulty,
    a count below 1, or a family with fewer problems than its share.
    """
    check_families(families)
    _check_difficulty(difficulty)
    if count < 1:
        raise ValueError(f"count = {count}: must be at least 1")
    rng = random.Random(f"lockstep problems {split} {seed} {difficulty}")
    share, left_over = divmod(count, len(families))
    problems: list[Problem] = []
    for index, family in enumerate(families):
        problems += _draw(family, split, share + (index < left_over), difficulty, rng)
    rng.shuffle(problems)
    return problems


def supervised_examples(
    count: int, seed: int, difficulty: int, families: Sequence[str], slip_rate: float
) -> Iterator[tuple[str, str]]:
    """`count` pairs (problem text, worked solution) for the warm start, from the train split only.

    Problems are drawn with replacement, families equally often; a share `slip_rate` (0..1) of the solutions slips.
    """
    check_families(families)
    _check_difficulty(difficulty)
    if not 0 <= slip_rate <= 1:
        raise ValueError(f"slip_rate = {slip_rate}: must lie in 0..1")
    rng = random.Random(f"lockstep supervised {seed} {difficulty}")
    return (_example(rng, difficulty, families, slip_rate) for _ in range(count))


def _example(rng: random.Random, difficulty: int, families: Sequence[str], slip_rate: float) -> tuple[str, str]:
    instance = rng.choice(_space(rng.choice(families), difficulty, "train"))
    text = instance.kind.text.format(**instance.names)
    return text, worked_solution(instance, rng, slip=rng.random() < slip_rate)
