"""`lockstep data`: what it makes, finds and measures, and how a mistake ends."""

import json
import shutil
from pathlib import Path

import pytest

from rl.data_sources import load_rows
from rl.monitor import read_json_lines
from tests.policy.chat import CHATML
from tests.rl.command import lockstep, refusal

PROBLEM = (
    "A farmer has 12 cows and 7 hens and sells 3 cows at noon for 5 coins each. How many coins does he get for them?"
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command writes by default is written under tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def test_data_make_and_check(tmp_path: Path) -> None:
    out = tmp_path / "made.jsonl"
    made = lockstep("data", "make", "--out", out, "--count", 12, "--split", "eval", "--difficulty", 3)
    assert (made.exit_code, made.stdout) == (0, f"12 problems written to {out}\n")
    assert len(load_rows(str(out))[0]) == 12
    checked = lockstep("data", "check", out)
    assert checked.exit_code == 0 and f"{out}: 12 good rows, 0 bad" in checked.stdout
    out.write_text(out.read_text() + '{"problem": "P"}\n')
    checked = lockstep("data", "check", out)
    assert checked.exit_code == 1 and f"{out}:13: no answer: " in checked.stdout
    out.write_text("")
    assert lockstep("data", "check", out).exit_code == 1


def test_data_check_shows_the_prompts_of_a_policy(finished_run: Path, tmp_path: Path) -> None:
    """Five characters are no more than five tokens; the template turns them into a chat."""
    (tmp_path / "mine.jsonl").write_text('{"problem": "7 + 1", "answer": "8"}\n')
    plain = lockstep("data", "check", tmp_path / "mine.jsonl", "--policy", finished_run)
    assert plain.exit_code == 0 and "prompts: plain text of " in plain.stdout
    assert "the first is '7 + 1\\n'" in plain.stdout
    policy = Path(shutil.copytree(finished_run / "policy", tmp_path / "policy"))
    (policy / "chat_template.jinja").write_text(CHATML)
    chat = lockstep("data", "check", tmp_path / "mine.jsonl", "--policy", policy)
    assert "prompts: chats of " in chat.stdout
    assert "the first is '<|im_start|>user\\n7 + 1<|im_end|>\\n<|im_start|>assistant\\n'" in chat.stdout


def test_generate_and_eval_speak_through_the_chat_template(finished_run: Path, tmp_path: Path) -> None:
    policy = Path(shutil.copytree(finished_run / "policy", tmp_path / "policy"))
    ask = ("generate", policy, "--prompt", "7 + 1", "--temperature", 0, "--max-new-tokens", 8)
    plain = lockstep(*ask).stdout
    (policy / "chat_template.jinja").write_text(CHATML)
    assert lockstep(*ask).exit_code == 0 and lockstep(*ask).stdout != plain
    (policy / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    template_fails = "the chat template fails on this chat: TemplateError: never"
    assert refusal(*ask).endswith(f"row the prompt: {template_fails}")
    assert refusal("eval", policy, "--data", "synthetic", "--samples", 1).endswith(template_fails)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("make", "--out", "made.jsonl", "--split", "test"), "--split test: must be train or eval"),
        (("make", "--out", "made.jsonl", "--count", "9999999"), "train problems wanted from family 'remainder'"),
        (("make", "--out", "nowhere/made.jsonl"), "nowhere/made.jsonl: cannot be written: No such file"),
        (("check", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ],
)
def test_data_refusals(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refusal("data", *arguments)
    assert list(tmp_path.iterdir()) == []


def _write(path: Path, *problems: str) -> Path:
    path.write_text("".join(json.dumps({"problem": problem, "answer": 15}) + "\n" for problem in problems))
    return path


def test_check_against_an_evaluation_set(tmp_path: Path) -> None:
    train = _write(tmp_path / "train.jsonl", "Sum of 1 and 2?", f"Solve this. {PROBLEM}")
    held_out = _write(tmp_path / "eval.jsonl", PROBLEM)
    found = lockstep("data", "check", train, "--against", held_out)
    assert found.exit_code == 1
    assert f"against {held_out}: 1 training problems hold 1 of the evaluation problems" in found.stdout
    assert f"{train}:2 holds 100% of {held_out}:1: 'A farmer has 12 cows" in found.stdout
    clean = lockstep("data", "check", _write(tmp_path / "train.jsonl", "Sum of 1 and 2?"), "--against", held_out)
    assert clean.exit_code == 0 and f"against {held_out}: none of its problems occurs here" in clean.stdout


def test_an_evaluation_set_that_cannot_be_read_whole_is_refused(tmp_path: Path) -> None:
    train = _write(tmp_path / "train.jsonl", PROBLEM)
    (tmp_path / "eval.jsonl").write_text('{"problem": "P"}\n')
    message = refusal("data", "check", train, "--against", tmp_path / "eval.jsonl")
    assert "eval.jsonl: 1 rows cannot be used, so not all is checked; first " in message


def test_list_names_the_known_datasets() -> None:
    listed = lockstep("data", "list")
    assert listed.exit_code == 0
    for name in ("aime24", "aime25", "math500", "gsm8k", "dapo-math-17k", "olympiadbench", "amc23"):
        assert f" {name} " in listed.stdout


def test_pass_rates_are_a_column_that_reads_back(finished_run: Path, tmp_path: Path) -> None:
    lockstep("data", "make", "--out", tmp_path / "set.jsonl", "--count", 6)
    options = ("--samples", 4, "--max-new-tokens", 30)
    rate = ("data", "pass-rates", finished_run, "--data", tmp_path / "set.jsonl", "--out", tmp_path / "rated.jsonl")
    result = lockstep(*rate, *options)
    assert result.exit_code == 0, result.output
    before, after = read_json_lines(tmp_path / "set.jsonl"), read_json_lines(tmp_path / "rated.jsonl")
    measured = json.loads((tmp_path / "rated.eval.json").read_text())["rows"]
    assert [
        record | {"pass_rate": row["correct"] / 4, "pass_rate_samples": 4}
        for record, row in zip(before, measured, strict=True)
    ] == after
    rows, bad = load_rows(str(tmp_path / "rated.jsonl"))
    assert bad == [] and [row.pass_rate for row in rows] == [row["correct"] / 4 for row in measured]
    never = sum(row["correct"] == 0 for row in measured)
    assert f"6 problems in {tmp_path}/rated.jsonl: {never} never solved, " in result.stdout


@pytest.mark.parametrize(
    ("data", "out", "message"),
    [
        (
            "synthetic",
            "rated.jsonl",
            "--data synthetic: give a file, such as `lockstep data make --out problems.jsonl`",
        ),
        ("set.jsonl", "rated.json", "--out rated.json: must be a .jsonl file in a folder that exists"),
        (
            "set.jsonl",
            "nowhere/rated.jsonl",
            "--out nowhere/rated.jsonl: must be a .jsonl file in a folder that exists",
        ),
        ("set.jsonl", "rated.jsonl", "set.jsonl: no such file"),
    ],
)
def test_pass_rates_refusals(finished_run: Path, data: str, out: str, message: str) -> None:
    assert message in refusal("data", "pass-rates", finished_run, "--data", data, "--out", out)
