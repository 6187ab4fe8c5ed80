"""How a server of our own is started and ended, without SGLang: other programs stand in for its interpreter."""

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.config import RolloutConfig
from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.launch import CPU_STUBS, HERE, server_arguments, server_environment
from tests.policy.tiny import family_config


def open_engine(folder: Path, **sglang: Any) -> SglangEngine:
    rollout = RolloutConfig.model_validate({"engine": "sglang", "sglang": {"start_seconds": 1.0, **sglang}})
    return SglangEngine(family_config("qwen3"), folder, torch.float32, rollout, torch.device("cpu"))


def interpreter(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout.sglang.python = /nowhere/python: cannot be run .*\.ci/sglang DIR"):
        open_engine(tmp_path, python="/nowhere/python")


def test_a_server_that_ends_at_once_is_quoted(tmp_path: Path) -> None:
    script = "for i in $(seq 30); do echo line $i; done; echo No module named sglang >&2; exit 3"
    with pytest.raises(ValueError, match=r"did not start(.|\n)*line 30\nNo module named sglang") as caught:
        open_engine(tmp_path, python=interpreter(tmp_path, script))
    assert "line 11\n" not in str(caught.value)


def test_a_server_that_never_gets_healthy_is_ended(tmp_path: Path) -> None:
    script = f"echo $$ > {tmp_path}/pid; sleep 100"
    with pytest.raises(ValueError, match=r"for 0.5 s \(rollout.sglang.start_seconds\). The last lines"):
        open_engine(tmp_path, python=interpreter(tmp_path, script), start_seconds=0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_server_ends_with_what_it_started_when_its_pipe_does(tmp_path: Path) -> None:
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").touch()
    script = (
        "import subprocess, time\nsubprocess.Popen(['sleep', '100'])\nprint('started', flush=True)\ntime.sleep(100)\n"
    )
    (package / "launch_server.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, "-P", HERE / "child.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    process.stdin.close()
    assert process.wait(20) == -signal.SIGKILL
    assert process.stdout.read() == b""  # which ends when the last that holds it has
    process.stdout.close()


def test_on_a_cpu_torchvision_and_vllm_are_stubs_that_answer_to_anything() -> None:
    script = (
        "import torchvision.transforms.v2 as v2; from vllm.model_executor import Layer\n"
        "class Mine(v2.Transform.Kind): pass\n"
        "Mine(1, two=3); print(v2.__name__, Layer.anything.more)\n"
        "try:\n    import nowhere\nexcept ModuleNotFoundError as error:\n    print(error)\n"
        "print(hasattr(v2, '__wrapped__'))"
    )
    environment = os.environ | {"PYTHONPATH": str(CPU_STUBS)}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    lines = found.stdout.splitlines()
    assert lines[0].startswith("torchvision.transforms.v2") and lines[1:] == ["No module named 'nowhere'", "False"]


def test_on_a_cpu_no_memory_is_pinned_and_the_rest_of_that_module_is_sglangs(tmp_path: Path) -> None:
    folder = tmp_path / "sglang" / "srt" / "mem_cache" / "pool_host"
    folder.mkdir(parents=True)
    (folder / "common.py").write_text("def _cuda_host_register(buffer, size=None):\n    raise OSError\nKEPT = 7\n")
    (folder / "other.py").write_text("def _cuda_host_register(buffer):\n    return 'its own'\n")
    script = (
        "from sglang.srt.mem_cache.pool_host import common, other\n"
        "print(common._cuda_host_register(None, 3), common.KEPT, other._cuda_host_register(None))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CPU_STUBS), str(tmp_path)])}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "None 7 its own\n"


@pytest.mark.parametrize("replay", ["none", "experts"])
def test_the_server_records_experts_where_they_are_replayed(tmp_path: Path, replay: str) -> None:
    rollout = RolloutConfig.model_validate({"engine": "sglang", "routing_replay": replay})
    found = server_arguments(family_config("qwen3_moe"), tmp_path, torch.float32, rollout, False, 4321)
    assert ("--enable-return-routed-experts" in found) == (replay == "experts")


@pytest.mark.parametrize("cuda", [False, True])
def test_arguments_follow_the_recipe(tmp_path: Path, cuda: bool) -> None:
    rollout = RolloutConfig.model_validate(
        {
            "memory_mb": 1,
            "prefix_cache": False,
            "on_new_weights": "continue",
            "sglang": {"arguments": ["--tp-size", "2"]},
        }
    )
    found = server_arguments(family_config("qwen3"), tmp_path, torch.bfloat16, rollout, cuda, 4321)
    named = dict(pairwise(found))
    assert named["--host"] == "127.0.0.1" and named["--port"] == "4321" and named["--dtype"] == "bfloat16"
    assert named["--max-total-tokens"] == str(2**20 // (2 * 3 * 2 * 16 * 2)) and named["--context-length"] == "98"
    assert {"--disable-radix-cache", "--skip-tokenizer-init", "--disable-overlap-schedule"} < set(found)
    assert found[-2:] == ["--tp-size", "2"]
    assert ("--disable-cuda-graph" in found) == ("torch_native" in found) == (not cuda)
    environment = server_environment(cuda)
    assert (str(CPU_STUBS) in environment.get("PYTHONPATH", "")) == (not cuda)
