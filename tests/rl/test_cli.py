"""The `lockstep` command in this process: what it prints, what it touches, and how a mistake ends."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from policy.tokenizer import load_tokenizer
from rl.config import load_recipe
from rl.monitor import read_metrics
from rl.train import resolve
from tests.rl.command import lockstep, refusal
from tests.rl.tiny import GROUP, LocalSystem, full_disk_at, write_recipe


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command writes by default is written under tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def everything_under(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_version() -> None:
    result = lockstep("--version")
    assert (result.exit_code, result.stdout) == (0, "lockstep 0.1.0\n")


def test_every_command_has_help() -> None:
    assert lockstep("--help").exit_code == 0
    for command in (
        "train",
        "report",
        "doctor",
        "eval",
        "compare-eval",
        "export",
        "generate",
        "plan",
        "data make",
        "data check",
        "data list",
        "data pass-rates",
        "reward check",
        "reward test",
    ):
        result = lockstep(*command.split(), "--help")
        assert result.exit_code == 0 and "Usage: " in result.stdout


def test_dry_run_prints_the_plan_and_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = write_recipe(tmp_path)
    result = lockstep("train", recipe, "loop.steps=9", "--run-dir", tmp_path / "run", "--dry-run")
    assert result.exit_code == 0, result.output
    resolved, plan = result.stdout.split("\n---\n")
    (tmp_path / "again.yaml").write_text(resolved)
    again = load_recipe(tmp_path / "again.yaml")
    assert again == resolve(load_recipe(recipe, ["loop.steps=9"]))[0] == resolve(again)[0]
    for line in (
        "base policy: to be made by the warm start",
        "data: 40 training and 8 held-out problems",
        "loop: 9 steps of 4 prompts x 4 completions",
        "workers: 1 engines x 1 threads, a trainer with 1",
    ):
        assert line in plan
    assert everything_under(tmp_path) == {recipe, tmp_path / "again.yaml"}


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    message = refusal("train", write_recipe(tmp_path), "rollout.worker=2", "--run-dir", tmp_path / "run")
    assert "unknown key 'rollout.worker': did you mean 'rollout.workers'?" in message
    assert not (tmp_path / "run").exists()


def test_missing_recipe(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    message = refusal("train", tmp_path / "tyni.yaml")
    assert message == f"recipe {tmp_path}/tyni.yaml: no such file; did you mean {tmp_path}/tiny.yaml?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mine.jsonl: no such file"),
        ("", "mine.jsonl: no rows; a data set needs at least one"),
        ('{"problem": "P"}\n{"problem": "Q", "answer": 1}\n', "1 of 2 rows cannot be used (run `lockstep data check "),
    ],
    ids=["missing", "empty", "bad row"],
)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_bad_data_is_refused_before_anything_starts(
    tmp_path: Path, content: str | None, message: str, split: str
) -> None:
    recipe = write_recipe(tmp_path)
    if content is not None:
        (tmp_path / "mine.jsonl").write_text(content)
    before = everything_under(tmp_path)
    found = refusal("train", recipe, f"data.{split}={tmp_path}/mine.jsonl", "--run-dir", tmp_path / "run")
    assert message in found
    assert everything_under(tmp_path) == before


def test_resume_without_a_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert refusal("train", recipe, "--resume").startswith("no run named tiny under runs/ to resume; give --run-dir")
    assert "holds no run" in refusal("train", recipe, "--resume", "--run-dir", tmp_path)


def test_a_folder_that_holds_a_run_is_refused(finished_run: Path, tmp_path: Path) -> None:
    before = (finished_run / "summary.json").read_text()
    message = refusal("train", write_recipe(tmp_path), "--run-dir", finished_run)
    assert message == f"{finished_run} already holds a run; continue it with --resume, or give another --run-dir"
    assert (finished_run / "summary.json").read_text() == before


def test_train_goes_to_a_folder_of_its_name_and_resume_finds_it(local: list[LocalSystem], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    result = lockstep("train", recipe, "loop.steps=1")
    assert result.exit_code == 0, result.output
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("tiny-")
    assert "step 1/1  reward 0." in result.stdout and "run completed" in result.stdout
    resumed = lockstep("train", recipe, "loop.steps=1", "--resume")
    assert resumed.exit_code == 0 and f"resumed after step 1 from runs/{run.name}/" in resumed.stdout
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]


def test_a_long_prompt_is_named(local: list[LocalSystem], tmp_path: Path) -> None:
    message = refusal("train", write_recipe(tmp_path), "data.max_prompt_tokens=9", "--run-dir", tmp_path / "run")
    assert message.startswith("40 of 40 prompts exceed data.max_prompt_tokens = 9: remainder-")


def test_a_full_disk_ends_in_one_message_and_leaves_what_was_written(
    local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr("trainer.state._write_file", full_disk_at("trainer.state._write_file", call=5))
    message = refusal("train", write_recipe(tmp_path), "--run-dir", run)
    assert message == (
        "No space left on device; free some space and go on with --resume. What was already written is intact"
    )
    assert [record["step"] for record in read_metrics(run)] == [1, 2, 3]
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    exported = lockstep("export", run, "--out", tmp_path / "exported")
    assert exported.exit_code == 0 and "policy after 2 steps in " in exported.stdout


def test_ctrl_c_says_how_to_go_on(local: list[LocalSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rl.loop.save_rollouts", interrupt)
    result = lockstep("train", write_recipe(tmp_path), "--run-dir", tmp_path / "run")
    assert (result.exit_code, result.stderr) == (130, "interrupted; go on with --resume\n")


def test_an_error_of_the_system_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/some/file")

    monkeypatch.setattr("rl.train.run_training", refuse)
    message = refusal("train", write_recipe(tmp_path))
    assert message == "Permission denied: /some/file. What was already written is intact"


def test_report_is_written_anew(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    result = lockstep("report", run)
    assert (result.exit_code, result.stdout) == (0, f"{run}/report.html\n")
    assert (run / "report.html").read_text() == before
    assert "holds no run (no recipe.yaml)" in refusal("report", tmp_path)


def test_export_prints_the_digest(finished_run: Path, tmp_path: Path) -> None:
    digest = json.loads((finished_run / "summary.json").read_text())["weights_digest"]
    result = lockstep("export", finished_run, "--out", tmp_path / "out")
    assert result.stdout == f"policy after 4 steps in {tmp_path}/out, weights digest {digest}\n"
    assert "is not empty" in refusal("export", finished_run, "--out", tmp_path / "out")


def test_generate_repeats_itself_and_follows_the_seed(finished_run: Path) -> None:
    ask = ("generate", finished_run, "--prompt", "Find the remainder when 2*3+1 is divided by 4.", "--samples", 3)
    first = lockstep(*ask, "--max-new-tokens", 30)
    assert first.exit_code == 0, first.output
    assert len(first.stdout.splitlines()) >= 3 and "boxed" in first.stdout
    assert lockstep(*ask, "--max-new-tokens", 30).stdout == first.stdout
    assert lockstep(*ask, "--max-new-tokens", 30, "--seed", 1).stdout != first.stdout


@pytest.mark.parametrize("command", [("eval", "--data", "synthetic"), ("generate", "--prompt", "P")])
def test_what_is_no_policy_is_refused(tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    assert refusal(name, tmp_path / "nowhere", *options).startswith(f"{tmp_path}/nowhere is not a policy: ")


def test_a_completion_that_cannot_fit_is_refused(finished_run: Path) -> None:
    message = refusal("generate", finished_run, "--prompt", "P", "--max-new-tokens", 300)
    assert "max_new_tokens 300 exceeds the policy's 256 positions" in message


def test_rollouts_hold_whole_groups_that_decode(finished_run: Path) -> None:
    tokenizer = load_tokenizer(finished_run / "policy")
    for path in sorted((finished_run / "rollouts").iterdir()):
        for line in path.read_text().splitlines():
            group = json.loads(line)
            assert len(group["completions"]) == GROUP
            for completion in group["completions"]:
                assert completion["rollout_log_probs"] == completion["log_probs"]
                assert len(completion["tokens"]) == len(completion["log_probs"])
                assert "".join(completion["tokens"]).removesuffix(tokenizer.eos_token) == completion["text"]
