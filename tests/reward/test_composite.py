"""The weighted sum: by hand, independent of the batch, and absent where a part of it failed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.composite import CompositeReward, Reward, RewardInput
from reward.config import RewardConfig
from reward.pool import RewardPool
from reward.result import Reason

RIGHT = RewardInput("so \\boxed{7}", "3 + 4?", "7", num_tokens=6, truncated=False)
WRONG = replace(RIGHT, completion="so \\boxed{8} is is is is", num_tokens=9)
SILENT = replace(RIGHT, completion="七", num_tokens=10, truncated=True)
ENDLESS = replace(RIGHT, completion="\\boxed{10^{10^{10}}}", answer="\\frac{1}{3}")
ALL_OF_TEXT = {
    "correctness": {"weight": 2.0},
    "format": {"weight": 0.5},
    "overlong": {"weight": 1.0, "max_tokens": 10, "buffer_tokens": 4},
    "language": {"weight": 0.25},
    "repetition": {"weight": 0.125, "ngram": 1},
}
FUNCTION = """
def score(completion, prompt, answer, num_tokens, truncated, level=0, **kwargs):
    if "die" in completion:
        import os
        os._exit(3)
    if "hang" in completion:
        while True:
            pass
    if "huge" in completion:
        return 1e7
    if "text" in completion:
        return "one"
    assert prompt == "3 + 4?" and answer == "7", "odd problem"
    return num_tokens / 2 - truncated + level + len(kwargs)
"""


def rewarded(inputs: Sequence[RewardInput], timeout_seconds: float = 60.0, **components: Any) -> list[Reward]:
    config = RewardConfig.model_validate({"components": components, "timeout_seconds": timeout_seconds})
    with RewardPool(config) as pool:
        return CompositeReward(config, pool).score(inputs)


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("user") / "mine.py"
    path.write_text(FUNCTION)
    yield f"{path}:score"


def test_alone_correctness_is_the_verdict() -> None:
    right, wrong = rewarded([RIGHT, WRONG])
    assert (right.total, dict(right.components), right.reason) == (1.0, {"correctness": 1.0}, Reason.CORRECT)
    assert (wrong.total, dict(wrong.components), wrong.reason) == (0.0, {"correctness": 0.0}, Reason.WRONG)
    assert (right.verdict.extracted, wrong.verdict.extracted) == ("7", "8")


def test_the_sum_by_hand() -> None:
    """Of `so \\boxed{8} is is is is` three words in six repeat an earlier one; of 10 tokens the last 4 are a buffer."""
    right, wrong, silent = rewarded([RIGHT, WRONG, SILENT], **ALL_OF_TEXT)
    assert list(right.components) == ["correctness", "format", "overlong", "language", "repetition"]
    assert list(right.components.values()) == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert list(wrong.components.values()) == [0.0, 1.0, -0.75, 1.0, -0.5]
    assert list(silent.components.values()) == [0.0, 0.0, -1.0, 0.0, 0.0]
    assert [each.total for each in (right, wrong, silent)] == [2.75, 0.5 - 0.75 + 0.25 - 0.0625, -1.0]
    assert silent.reason is Reason.NO_ANSWER and not silent.is_failure


@given(st.permutations([RIGHT, WRONG, SILENT, RIGHT]), st.integers(1, 4))
def test_a_reward_does_not_depend_on_the_batch(inputs: list[RewardInput], size: int) -> None:
    alone = [rewarded([each], **ALL_OF_TEXT)[0].total for each in inputs]
    assert [each.total for each in rewarded(inputs[:size], **ALL_OF_TEXT)] == alone[:size]


def test_nothing_is_scored_where_there_is_nothing() -> None:
    assert rewarded([], **ALL_OF_TEXT) == []


def test_a_verdict_of_no_weight_is_measured_and_earns_nothing() -> None:
    bad_gold = replace(RIGHT, answer=" ")
    right, failed = rewarded([RIGHT, bad_gold], correctness={"weight": 0}, format={})
    assert (right.total, right.components["correctness"]) == (1.0, 1.0)
    assert (failed.total, failed.components["correctness"], failed.reason) == (1.0, None, Reason.BAD_GOLD)
    assert not failed.is_failure


def test_a_failed_verification_is_no_zero() -> None:
    bad_gold, right = rewarded([replace(RIGHT, answer=" "), RIGHT], format={})
    assert bad_gold.is_failure and (bad_gold.total, bad_gold.reason) == (None, Reason.BAD_GOLD)
    assert dict(bad_gold.components) == {"correctness": None, "format": 1.0}
    assert right.total == 2.0


def test_a_hostile_pattern_costs_its_completion_only() -> None:
    hostile = replace(RIGHT, completion="a" * 40 + "\\boxed{7}")
    stuck, right = rewarded([hostile, RIGHT], timeout_seconds=0.5, format={"pattern": r"(a|a)*$|\}$", "weight": 0.5})
    assert (stuck.total, stuck.reason, stuck.components["correctness"]) == (None, Reason.TIMEOUT, 1.0)
    assert right.total == 1.5


def test_a_users_function_gets_every_argument(function: str) -> None:
    """6 / 2 for the tokens; 10 / 2 - 1 for a truncated one; level 3 and one more column."""
    columns = {"level": 3, "subject": "algebra", "completion": "no column hides an argument"}
    inputs = [RIGHT, SILENT, replace(RIGHT, columns=columns)]
    rewards = rewarded(inputs, function={"path": function, "weight": 0.5})
    assert [each.components["function"] for each in rewards] == [3.0, 4.0, 7.0]
    assert [each.total for each in rewards] == [2.5, 2.0, 4.5]


def test_what_goes_wrong_in_a_users_function_is_said_and_is_no_zero(function: str) -> None:
    texts = ("die", "hang", "huge", "text", "fine")
    inputs = [*(replace(RIGHT, completion=f"{text} \\boxed{{7}}") for text in texts), replace(RIGHT, answer="8")]
    rewards = rewarded(inputs, timeout_seconds=1.0, function={"path": function})
    assert [each.reason for each in rewards] == [
        Reason.WORKER_DIED,
        Reason.TIMEOUT,
        Reason.USER_ERROR,
        Reason.USER_ERROR,
        Reason.CORRECT,
        Reason.USER_ERROR,
    ]
    assert [each.total for each in rewards] == [None, None, None, None, 4.0, None]
    assert rewards[2].message == "returned 1e+07; a reward must lie between -1e+06 and 1e+06"
    assert "returned str 'one'" in rewards[3].message
    assert rewards[5].message == "AssertionError: odd problem (mine.py, line 13)"
    assert [each.components["correctness"] for each in rewards] == [1.0] * 5 + [0.0]


def test_a_function_that_was_changed_in_mid_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def score(**kwargs):\n    return 1\n")
    config = RewardConfig.model_validate({"components": {"function": {"path": f"{path}:score", "sha256": "0" * 64}}})
    with RewardPool(config) as pool, pytest.raises(ValueError, match=r"mine\.py:score has SHA-256 .* was changed"):
        CompositeReward(config, pool).score([RIGHT])
