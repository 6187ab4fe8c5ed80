"""The generator: right and slipped solutions by hand, honest arithmetic, disjoint splits, equal shares."""

import random
import re
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.problems import FAMILIES, KINDS, Instance, Split, _space, generate, supervised_examples, worked_solution

BY_NAME = {kind.name: kind for kind in KINDS}
WORKED = [
    ("remainder", (7, 8, 5, 9), "7*8=56. 56+5=61. 61=6*9+7. The remainder is \\boxed{7}."),
    (
        "remainder_nested",
        (7, 8, 5, 4, 9, 7),
        "7*8=56. 56+5=61. 61*4=244. 244+9=253. 253=36*7+1. The remainder is \\boxed{1}.",
    ),
    ("rows", (6, 7, 15), "6*7=42. 42+15=57. The total is \\boxed{57}."),
    ("bags", (3, 8, 4, 6), "3*8=24. 4*6=24. 24+24=48. The total is \\boxed{48}."),
    ("boxes", (4, 6, 7, 5, 9), "6*7=42. 42+5=47. 4*47=188. 188-9=179. The total is \\boxed{179}."),
    ("multiples", (4, 37), "37=9*4+1. The count is \\boxed{9}."),
    ("multiples_between", (4, 38, 211), "211=52*4+3. 38-1=37. 37=9*4+1. 52-9=43. The count is \\boxed{43}."),
    ("roads", (6, 7, 5), "6*7=42. 42+5=47. The count is \\boxed{47}."),
    ("roads_twice", (6, 7, 5, 4), "6*7=42. 42*5=210. 210+4=214. The count is \\boxed{214}."),
    ("term", (5, 7, 6), "6-1=5. 5*7=35. 5+35=40. The term is \\boxed{40}."),
    ("series", (5, 7, 6), "6-1=5. 5*7=35. 5+35=40. 5+40=45. 45*6=270. 270/2=135. The sum is \\boxed{135}."),
]


@pytest.mark.parametrize(("name", "operands", "solution"), WORKED, ids=[row[0] for row in WORKED])
def test_right_solution_by_hand(name: str, operands: tuple[int, ...], solution: str) -> None:
    assert worked_solution(Instance(BY_NAME[name], operands), random.Random(0), slip=False) == solution


def test_every_kind_is_worked_by_hand() -> None:
    assert {name for name, _, _ in WORKED} == set(BY_NAME)


def _sides(step: str) -> tuple[int, int]:
    """Both sides of "7*8=56" or "61=6*9+7", evaluated; division must come out whole."""
    left, right = step.split("=")
    if "/" in left:
        dividend, divisor = map(int, left.split("/"))
        return dividend, int(right) * divisor
    return eval(left), eval(right)


def _steps_and_answer(solution: str) -> tuple[list[str], int]:
    *steps, _closing = solution.split(". ")
    boxed = re.search(r"\\boxed\{(0|[1-9]\d{0,2})\}\.$", solution)
    assert boxed, solution
    return steps, int(boxed.group(1))


def _wrong_steps(solution: str) -> list[str]:
    steps, _ = _steps_and_answer(solution)
    return [step for step in steps if len(set(_sides(step))) > 1]


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_generated_problems_are_sound(difficulty: int) -> None:
    problems = generate("train", 400, 7, difficulty, FAMILIES)
    assert len({each.problem for each in problems}) == len({each.id for each in problems}) == 400
    assert Counter(each.family for each in problems) == dict.fromkeys(FAMILIES, 100)
    for each in problems:
        assert _wrong_steps(each.solution) == []
        assert _steps_and_answer(each.solution)[1] == int(each.answer)
        assert len(each.problem) <= 100 and each.problem.isascii()


def test_answers_by_independent_arithmetic() -> None:
    """Read the operands back out of the text and work the problem another way than by its steps."""
    for each in generate("eval", 400, 3, 1, FAMILIES):
        numbers = [int(number) for number in re.findall(r"\d+", each.problem)]
        match each.problem.split()[0]:
            case "Find":
                expected = (numbers[0] * numbers[1] + numbers[2]) % numbers[3]
            case "How":
                expected = sum(number % numbers[0] == 0 for number in range(1, numbers[2] + 1))
            case "Ann":
                expected = numbers[0] * numbers[1] + numbers[2] * numbers[3]
            case "An":
                expected = list(range(numbers[0], 10_000, numbers[1]))[numbers[2] - 1]
            case _:
                expected = numbers[0] * numbers[1] + numbers[2]
        assert each.answer == str(expected), each.problem


def test_difficulty_one_answers_are_mostly_small() -> None:
    answers = [int(each.answer) for each in generate("train", 1000, 0, 1, FAMILIES)]
    assert sum(answer <= 99 for answer in answers) > 900


def test_difficulty_three_takes_more_steps_than_one() -> None:
    lengths = {
        difficulty: sum(
            len(_steps_and_answer(each.solution)[0]) for each in generate("train", 200, 0, difficulty, FAMILIES)
        )
        for difficulty in (1, 3)
    }
    assert lengths[3] >= lengths[1] + 200


def _all_problems(split: Split, family: str, difficulty: int) -> set[str]:
    count = len(_space(family, difficulty, split))
    return {each.problem for each in generate(split, count, 0, difficulty, [family])}


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_train_and_eval_share_no_problem(difficulty: int) -> None:
    train, held_out = (_all_problems(split, "sequences", difficulty) for split in ("train", "eval"))
    assert len(train) > 2 * len(held_out) > 100
    assert not train & held_out


def test_mirrored_problem_is_in_the_same_split() -> None:
    kind = BY_NAME["remainder"]
    for a in range(2, 10):
        assert Instance(kind, (a, 7, 5, 9)).split == Instance(kind, (7, a, 5, 9)).split


def test_split_and_order_are_pinned() -> None:
    """If a version moved problems between splits, an old policy would be evaluated on what it was trained on."""
    kind = BY_NAME["remainder"]
    assert [Instance(kind, (7, 8, 5, d)).split for d in range(3, 10)] == ["train"] * 5 + ["eval", "train"]
    assert [each.id for each in generate("eval", 4, 0, 3, FAMILIES)] == [
        "remainder_nested-3-8-8-2-1-9",
        "series-22-5-4",
        "roads_twice-4-8-7-13",
        "boxes-3-3-2-4-6",
    ]


def test_seed_decides() -> None:
    assert generate("train", 40, 1, 1, FAMILIES) == generate("train", 40, 1, 1, FAMILIES)
    assert generate("train", 40, 1, 1, FAMILIES) != generate("train", 40, 2, 1, FAMILIES)


def test_uneven_count_gives_the_first_families_one_more() -> None:
    counts = Counter(each.family for each in generate("train", 6, 0, 1, FAMILIES))
    assert counts == {"remainder": 2, "arithmetic": 2, "counting": 1, "sequences": 1}


@pytest.mark.parametrize(
    ("count", "difficulty", "families", "message"),
    [
        (
            9999,
            1,
            ["remainder"],
            r"9999 train problems wanted from family 'remainder' at difficulty 1, which has \d{3}:",
        ),
        (0, 1, ["remainder"], r"count = 0: must be at least 1"),
        (1, 4, ["remainder"], r"difficulty = 4: must be one of 1, 2, 3"),
        (1, 1, ["geometry"], r"families = \['geometry'\]: give one or more of remainder, arithmetic, counting, seq"),
        (1, 1, ["counting", "counting"], r"each once"),
        (1, 1, [], r"give one or more"),
    ],
)
def test_refusals(count: int, difficulty: int, families: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate("train", count, 0, difficulty, families)


@given(name=st.sampled_from(sorted(BY_NAME)), pick=st.randoms(use_true_random=False), seed=st.integers(0, 2**32))
def test_slip_is_one_wrong_step_carried_to_a_wrong_answer(name: str, pick: random.Random, seed: int) -> None:
    kind = BY_NAME[name]
    ranges = kind.ranges[pick.choice(sorted(kind.ranges))]
    instance = Instance(kind, tuple(pick.choice(values) for values in ranges.values()))
    right = worked_solution(instance, random.Random(0), slip=False)
    wrong = worked_solution(instance, random.Random(seed), slip=True)
    assert len(_wrong_steps(wrong)) == 1
    assert _steps_and_answer(wrong)[1] != _steps_and_answer(right)[1]
    assert re.sub(r"\d+", "9", wrong) == re.sub(r"\d+", "9", right), "the form gives the slip away"


def test_slip_is_carried_through_by_hand() -> None:
    """2 bags of 3 and 4 bags of 5: one product off and the sum right for it, or the sum off."""
    instance = Instance(BY_NAME["bags"], (2, 3, 4, 5))
    for seed in range(200):
        steps, answer = _steps_and_answer(worked_solution(instance, random.Random(seed), slip=True))
        first, second = (int(step.split("=")[1]) for step in steps[:2])
        assert steps[2] == f"{first}+{second}={answer}"
        assert (first != 6) + (second != 20) + (answer != first + second) == 1


def test_slips_hit_every_step_and_vary() -> None:
    instance = Instance(BY_NAME["term"], (5, 7, 6))
    slipped = Counter(_wrong_steps(worked_solution(instance, random.Random(seed), slip=True))[0] for seed in range(300))
    assert {step.split("=")[0] for step in slipped} >= {"6-1", "5*7", "5+35"}
    assert len(slipped) > 15


def test_supervised_examples_are_train_problems_with_the_asked_share_of_slips() -> None:
    examples = list(supervised_examples(2000, 5, 1, FAMILIES, slip_rate=0.25))
    assert len(examples) == 2000
    assert 400 < sum(bool(_wrong_steps(solution)) for _, solution in examples) < 600
    held_out = {problem for family in FAMILIES for problem in _all_problems("eval", family, 1)}
    assert not held_out & {problem for problem, _ in examples}


@pytest.mark.parametrize(("slip_rate", "expected"), [(0.0, 0), (1.0, 50)])
def test_slip_rate_at_its_ends(slip_rate: float, expected: int) -> None:
    examples = supervised_examples(50, 0, 3, FAMILIES, slip_rate)
    assert sum(bool(_wrong_steps(solution)) for _, solution in examples) == expected


def test_supervised_stream_does_not_depend_on_its_length() -> None:
    assert list(supervised_examples(5, 1, 1, FAMILIES, 0.5)) == list(
        islice(supervised_examples(10**9, 1, 1, FAMILIES, 0.5), 5)
    )


def test_supervised_examples_refuse_a_bad_rate_at_once() -> None:
    with pytest.raises(ValueError, match=r"slip_rate = 1.5: must lie in 0..1"):
        supervised_examples(1, 0, 1, FAMILIES, 1.5)
