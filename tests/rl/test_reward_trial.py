"""The trial of a user's reward function: what it finds, and what `lockstep reward` prints of it."""

import json
from pathlib import Path

import pytest

from reward.composite import RewardInput
from reward.config import RewardConfig
from rl.reward_trial import EXAMPLES, check_function, read_inputs, try_function
from tests.rl.command import lockstep, refusal

INPUTS = [RewardInput(text, "P", "7", len(text), False) for text in ("one", "three", "seven")]
GOOD = "def score(completion, num_tokens, **kwargs):\n    return len(completion) / 10 - num_tokens\n"


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(code: str, name: str = "mine.py") -> str:
    Path(name).write_text(code)
    return f"{name}:score"


def problems(code: str, timeout_seconds: float = 60.0) -> list[str]:
    config = RewardConfig(timeout_seconds=timeout_seconds)
    return [trial.problem for trial in try_function(written(code), INPUTS, config)]


def test_a_sound_function_has_its_values_and_no_problem() -> None:
    trials = try_function(written(GOOD), INPUTS, RewardConfig())
    assert [trial.first.value for trial in trials] == [0.3 - 3, 0.5 - 5, 0.5 - 5]
    assert [trial.problem for trial in trials] == [""] * 3


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def score(completion):\n    return 1\n", "TypeError: score() got an unexpected keyword argument 'prompt'"),
        (
            "def score(completion, prompt, answer, num_tokens, truncated):\n    return 1\n",
            "TypeError: score() got an unexpected keyword argument 'any_other_column'",
        ),
        ("def score(text, **kwargs):\n    return 1\n", "TypeError: score() missing 1 required positional argument"),
        ("def score(**kwargs):\n    return float('nan')\n", "returned nan; it must return a finite number"),
        ("def score(**kwargs):\n    return None\n", "returned NoneType None; it must return a number"),
        ("def score(**kwargs):\n    return 1e9\n", "returned 1e+09; a reward must lie between -1e+06 and 1e+06"),
    ],
)
def test_what_is_wrong_is_said_for_every_completion(code: str, expected: str) -> None:
    found = problems(code)
    assert len(found) == 3 and all(problem.startswith(expected) for problem in found), found


def test_a_function_that_hangs_on_one_completion_spoils_no_other() -> None:
    code = "def score(completion, **kwargs):\n    while completion == 'three':\n        pass\n    return 1\n"
    assert problems(code, timeout_seconds=0.5) == ["", "no answer within 0.5 s", ""]


@pytest.mark.parametrize(
    "code",
    [
        "calls = []\ndef score(**kwargs):\n    calls.append(1)\n    return len(calls)\n",
        "import random\ndef score(**kwargs):\n    return random.random()\n",
        "import os\ndef score(**kwargs):\n    return os.getpid()\n",
    ],
    ids=["counts its calls", "draws", "knows its process"],
)
def test_a_function_of_more_than_its_arguments_is_found_out(code: str) -> None:
    found = problems(code)
    assert any("when called again; a reward must follow from its arguments alone" in problem for problem in found)


def recipe_with(path: str) -> RewardConfig:
    return RewardConfig.model_validate({"components": {"function": {"path": path}}})


def test_a_run_checks_the_function_on_its_first_problem() -> None:
    code = "def score(completion, level, **kwargs):\n    return level + ('boxed{42}' in completion)\n"
    check_function(recipe_with(written(code)), "P", "42", {"level": 3})
    check_function(RewardConfig(), "P", "42", {})
    with pytest.raises(ValueError) as error:
        check_function(recipe_with(written(code)), "P", "42", {})
    assert str(error.value) == (
        "reward.components.function: mine.py:score fails on the completion 'so \\\\boxed{42}': user_error: TypeError: "
        "score() missing 1 required positional argument: 'level'. `lockstep reward test mine.py:score` shows more"
    )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def reward(**kwargs):\n    return 1\n", "mine.py has no function 'score'; it has reward"),
        ("def score(**kwargs)\n    return 1\n", "cannot load mine.py: SyntaxError: expected ':' ("),
        ("import nowhere\n", "cannot load mine.py: ModuleNotFoundError: No module named 'nowhere' (mine.py, line 1)"),
    ],
    ids=["another name", "no Python", "fails when imported"],
)
def test_a_function_that_cannot_be_loaded_is_refused(code: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_function(recipe_with(written(code)), "P", "42", {})
    assert message in str(error.value)


def test_a_file_that_hangs_when_imported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward.process.STARTUP_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"^mine\.py:score: a reward worker did not start"):
        check_function(recipe_with(written("while True:\n    pass\n")), "P", "42", {})


def test_completions_are_read_with_what_is_known_of_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    full = {"completion": "so 7", "prompt": "P", "answer": 7, "num_tokens": 9, "truncated": True, "level": 3}
    path.write_text(json.dumps(full) + '\n{"completion": "so it is"}\n')
    assert read_inputs(path) == [
        RewardInput("so 7", "P", "7", 9, True, {"level": 3}),
        RewardInput("so it is", "", "", 3, False, {}),
    ]


def test_the_rollouts_of_a_run_are_read(finished_run: Path) -> None:
    inputs = read_inputs(finished_run / "rollouts" / "step_000001.jsonl")
    record = json.loads((finished_run / "rollouts" / "step_000001.jsonl").read_text().splitlines()[0])
    first = record["completions"][0]
    assert len(inputs) == 16
    assert inputs[0] == RewardInput(
        first["text"], record["prompt"], record["gold"], len(first["tokens"]), first["finish_reason"] == "length"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give a JSONL file of completions"),
        ("", "no completions in it"),
        ('{"text": "so"}\n', "a line has no text under `completion`; its keys are text"),
        ('{"completion": 7}\n', "a line has no text under `completion`"),
    ],
)
def test_a_file_without_completions_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_inputs(tmp_path / "mine.jsonl")


def test_the_command_tries_the_examples(tmp_path: Path) -> None:
    result = lockstep("reward", "test", written(GOOD))
    assert result.exit_code == 0, result.output
    assert f"{len(EXAMPLES)} completions, 0 with something wrong" in result.stdout
    assert "'3 + 4 = 7, so \\\\boxed{7}'" in result.stdout


def test_the_command_says_what_is_wrong_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.cli_support.console._width", 300)  # so that no path is broken
    (tmp_path / "data.jsonl").write_text('{"completion": "[bold]", "answer": "7"}\n{"completion": "9"}\n')
    result = lockstep(
        "reward", "test", written("def score(answer, **kw):\n    return int(answer)\n"), "--data", "data.jsonl"
    )
    assert result.exit_code == 1
    assert "'[bold]'" in result.stdout and "2 completions, 1 with something wrong" in result.stdout
    assert "user_error" in result.stdout and "(mine.py, line 2)" in result.stdout


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mine.py", "path: must be FILE.py:NAME, such as my_rewards.py:score, got 'mine.py'"),
        ("mine.py:score", "cannot load mine.py: FileNotFoundError: no such file in "),
    ],
)
def test_the_command_refuses_what_names_no_function(path: str, message: str) -> None:
    assert message in refusal("reward", "test", path)


@pytest.mark.parametrize(
    ("completion", "answer", "code", "expected"),
    [
        ("so \\boxed{073}", "73", 0, ("score", "1", "correct", "073", "integer")),
        ("so \\boxed{8}", "7", 0, ("score", "0", "wrong")),
        ("so 7", "7", 0, ("0", "no_answer", "nothing")),
        ("so \\boxed{[bold]}", " ", 1, ("none, the verification failed", "bad_gold", "[bold]")),
    ],
)
def test_a_verdict_and_its_reason_are_printed(
    completion: str, answer: str, code: int, expected: tuple[str, ...]
) -> None:
    result = lockstep("reward", "check", completion, "--answer", answer)
    assert result.exit_code == code, result.output
    assert all(word in result.stdout for word in expected), result.stdout


def test_another_marker() -> None:
    assert "correct" in lockstep("reward", "check", "#### 7", "--answer", "7", "--marker", "####").stdout
