"""The reward section: what the default is worth, and what is refused."""

import pytest
from pydantic import ValidationError

from reward.config import RewardConfig


def components(**sections: object) -> RewardConfig:
    return RewardConfig.model_validate({"components": sections})


def test_by_default_a_correct_answer_is_all_that_counts() -> None:
    assert RewardConfig().components.weights() == {"correctness": 1.0}


def test_weights_are_in_the_order_in_which_they_are_added_up() -> None:
    config = components(
        function={"path": "a.py:f", "weight": 0.5}, format={}, correctness={"weight": 2.0}, overlong=dict(OVERLONG)
    )
    assert list(config.components.weights().items()) == [
        ("correctness", 2.0),
        ("format", 1.0),
        ("overlong", 1.0),
        ("function", 0.5),
    ]


OVERLONG = {"max_tokens": 10, "buffer_tokens": 4}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"correctness": {"weight": -1}}, "greater than or equal to 0"),
        ({"correctness": {"weight": float("inf")}}, "finite number"),
        ({"correctness": {"weight": 0}}, "correctness.weight is 0 and nothing else counts"),
        ({"format": {"weight": 0}}, "greater than 0"),
        ({"format": {"answer": False}}, "answer, thinking and pattern ask for nothing"),
        ({"format": {"pattern": "("}}, "must be a Python regular expression, got '('"),
        ({"overlong": {"max_tokens": 10}}, "Field required"),
        ({"overlong": {"max_tokens": 10, "buffer_tokens": 11}}, "buffer_tokens = 11 exceeds max_tokens = 10"),
        ({"language": {"script": "klingon"}}, "Input should be 'latin', 'cjk'"),
        ({"repetition": {"ngram": 0}}, "greater than or equal to 1"),
        ({"function": {"path": "a.py"}}, "must be FILE.py:NAME, such as my_rewards.py:score, got 'a.py'"),
        ({"function": {"path": "a.b:f"}}, "must be FILE.py:NAME"),
        ({"function": {"path": "a.py:f()"}}, "must be FILE.py:NAME"),
        ({"function": {"path": "a.py:f", "sha256": "12"}}, "String should match pattern"),
        ({"politeness": {}}, "Extra inputs are not permitted"),
    ],
)
def test_refusals(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        components(**sections)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "wrong", [{"max_failure_fraction": 1.1}, {"max_failure_fraction": -0.1}, {"failure_window": 0}]
)
def test_the_alarm_has_limits(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        RewardConfig.model_validate(wrong)
