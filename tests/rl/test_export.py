"""Exports: the same policy from the run, from its newest checkpoint, and a manifest that says what it is."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from policy.checkpoint import load_policy
from policy.digest import tensor_digest, weights_digest
from policy.tokenizer import load_tokenizer
from rl.base_policy import base_folder
from rl.config import load_recipe, recipe_digest
from rl.export import export_run, finish_export, parse_bytes, policy_folder, read_manifest
from rl.export_check import verify_export
from rl.run_folder import RunFolder
from rl.weight_sync import policy_digest
from tests.rl.command import lockstep
from tests.rl.tiny import STEPS, full_disk_at


def run_in_bf16(finished_run: Path, tmp_path: Path) -> Path:
    """The finished run, as if it had computed in BF16; its checkpoint holds FP32 masters all the same."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("dtype: float32", "dtype: bfloat16"))
    assert load_recipe(run / "recipe.yaml").policy.dtype == "bfloat16"
    return run


def test_manifest_ties_the_policy_to_its_run(finished_run: Path) -> None:
    folder = policy_folder(finished_run)
    assert folder == finished_run / "policy" == policy_folder(folder)
    manifest = read_manifest(folder)
    digests = {name: tensor_digest(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert manifest["tensor_digests"] == digests
    assert manifest["weights_digest"] == weights_digest(digests) == policy_digest(load_policy(folder))
    assert manifest["weights_digest"] == json.loads((finished_run / "summary.json").read_text())["weights_digest"]
    recipe = load_recipe(finished_run / "recipe.yaml")
    assert manifest["recipe_digest"] == recipe_digest(recipe.model_dump(mode="json"))
    assert (manifest["run"], manifest["step"]) == ("run", STEPS)
    assert (manifest["prompt_template"], manifest["answer_marker"]) == ("{problem}\n", "\\boxed")


def test_export_of_the_newest_checkpoint_is_the_runs_own_policy(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    digest, step = export_run(finished_run, out)
    assert step == STEPS
    assert read_manifest(out) == read_manifest(finished_run / "policy")
    assert digest == read_manifest(out)["weights_digest"]
    files = sorted(path.name for path in out.iterdir())
    assert files == sorted(path.name for path in (finished_run / "policy").iterdir())
    for name in files:
        assert (out / name).read_bytes() == (finished_run / "policy" / name).read_bytes(), name
    assert not (tmp_path / ".out.partial").exists()


def test_tokenizer_is_the_base_policys_to_the_byte(
    finished_run: Path, base_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(base_cache))
    source = base_folder(load_recipe(finished_run / "recipe.yaml"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copies = {(folder / name).read_bytes() for folder in (source, finished_run / "base")}
        assert copies == {(finished_run / "policy" / name).read_bytes()}
    assert (
        load_tokenizer(finished_run / "policy").eos_token_id == load_policy(finished_run / "policy").config.eos_token_id
    )


@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_fp32_export_of_any_run_is_verified_to_the_bit(
    max_shard_bytes: int, finished_run: Path, tmp_path: Path
) -> None:
    run, out = run_in_bf16(finished_run, tmp_path), tmp_path / "out"
    for dtype in (None, "float32"):
        export_run(run, out, dtype, max_shard_bytes)
        assert read_manifest(out)["dtype"] == (dtype or "bfloat16")
        assert (out / "model.safetensors").exists() == (max_shard_bytes == 10**9)
        tensors = len(read_manifest(out)["tensor_digests"])
        assert re.fullmatch(
            rf"{tensors} tensors have their digests; log-probs of \d+ tokens of 8 rollouts equal those of the "
            "checkpoint in every bit",
            verify_export(run, out),
        )
        shutil.rmtree(out)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_a_coarser_export_says_by_how_much(dtype: str, finished_run: Path, tmp_path: Path) -> None:
    export_run(finished_run, tmp_path / "out", dtype)
    found = verify_export(finished_run, tmp_path / "out")
    numbers = re.search(r"differ from those of the checkpoint by (\S+) on average and (\S+) at most", found)
    assert numbers is not None
    mean, largest = map(float, numbers.groups())
    assert 0 < mean < largest < 1
    assert found.endswith(f"as {dtype} weights are coarser than the run's float32")


def test_a_damaged_export_is_not_verified(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_run(finished_run, out)
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor \S+ does not have the SHA-256"):
        verify_export(finished_run, out)


def test_a_manifest_that_contradicts_itself_is_not_verified(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_run(finished_run, out)
    manifest = json.loads((out / "lockstep.json").read_text())
    (out / "lockstep.json").write_text(json.dumps(manifest | {"weights_digest": "0"}))
    with pytest.raises(ValueError, match="contradict each other; export again"):
        verify_export(finished_run, out)


def test_weights_of_another_policy_are_not_verified(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_run(finished_run, out)
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"][0] += 1e-3
    save_file(tensors, out / "model.safetensors")
    (out / "lockstep.json").unlink()
    finish_export(RunFolder(finished_run), out, load_recipe(finished_run / "recipe.yaml"), STEPS)
    with pytest.raises(ValueError, match="though its weights are as fine as the run's; do not use it"):
        verify_export(finished_run, out)


def test_without_rollouts_the_check_says_what_it_left_out(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("rollouts"))
    export_run(run, tmp_path / "out")
    assert verify_export(run, tmp_path / "out").endswith(
        "no log-probs compared, as the run kept no rollouts (loop.rollouts_saved)"
    )


@pytest.mark.parametrize("writer", ["policy.checkpoint_write.save_file", "rl.export.replace_text"])
def test_a_full_disk_leaves_no_folder_behind(
    writer: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer, full_disk_at(writer, 1))
        with pytest.raises(OSError, match="No space left"):
            export_run(finished_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export_run(finished_run, tmp_path / "out")


def test_command_writes_shards_and_verifies(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = lockstep("export", finished_run, "--out", out, "--max-shard-size", "50KB", "--dtype", "fp8", "--verify")
    assert result.exit_code == 0, result.output
    assert "verified: " in result.stdout and "as fp8 weights are coarser" in result.stdout
    assert max(path.stat().st_size for path in out.glob("*.safetensors")) < 60_000
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("5GB", 5 * 10**9), ("2GiB", 2**31), ("1 kb", 1000), ("3KiB", 3072)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["5", "0GB", "-1GB", "GB", "1.5GB", "5GBs"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--max-shard-size '{text}': give a whole number with a unit"):
        parse_bytes(text)


def test_export_refuses_a_folder_with_something_in_it(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"is not empty; give a new folder in --out"):
        export_run(finished_run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_export_before_the_first_checkpoint_says_so(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("step_*"))
    with pytest.raises(ValueError, match=r"has no checkpoint yet; the first comes after loop\.checkpoint_every steps"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_from_elsewhere_gets_the_usual_prompt(tmp_path: Path) -> None:
    prompt = {"prompt_template": "{problem}\n", "chat": "auto", "system": None, "thinking": None}
    assert read_manifest(tmp_path) == {**prompt, "answer_marker": "\\boxed"}
