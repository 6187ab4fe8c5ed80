"""Opening and closing a server: address, key, engine failures, and the command itself."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from rl.serve.run import ServeSettings, open_server
from tests.rl.command import refusal
from tests.rl.serve.conftest import running

SETTINGS = ServeSettings(
    policy=Path(), host="127.0.0.1", port=0, name="mine", api_key="secret", max_open=4, max_batch=2, memory_mb=4,
    speculative_tokens=0,
)  # fmt: skip
BODY = {"model": "mine", "prompt": "So", "max_tokens": 4}


def test_a_key_is_asked_for(served_policy: Path) -> None:
    with running(open_server(replace(SETTINGS, policy=served_policy))) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert httpx.post(f"{url}/v1/completions", json=BODY, headers=headers).status_code == 401
        answer = httpx.post(f"{url}/v1/completions", json=BODY, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_engine_answers_every_request_with_an_error(
    served_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = open_server(replace(SETTINGS, policy=served_policy, api_key=None))

    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server.worker.engine, "step", fail)
    with running(server) as url:
        for _ in range(2):
            answer = httpx.post(f"{url}/v1/completions", json=BODY)
            assert answer.status_code == 500
            assert answer.json()["error"]["message"] == "the engine failed: RuntimeError: out of memory"


def test_other_addresses_need_a_key(served_policy: Path) -> None:
    assert "lets other machines in: set --api-key" in refusal("serve", served_policy, "--host", "0.0.0.0")


def test_a_port_in_use_is_named(served_policy: Path) -> None:
    with running(open_server(replace(SETTINGS, policy=served_policy))) as url:
        port = url.rsplit(":", 1)[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in refusal("serve", served_policy, "--port", port)


def test_the_command_serves_and_ends_when_it_is_interrupted(served_policy: Path) -> None:
    command = [sys.executable, "-c", "from rl.cli import app; app()", "serve", str(served_policy), "--port", "0"]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            found = re.match(r"tiny at (http://127\.0\.0\.1:\d+)/v1 ", said)
            assert found, said
            answer = httpx.post(f"{found[1]}/v1/completions", json=BODY | {"model": "tiny"}, timeout=60)
            assert answer.status_code == 200
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=30)
            assert process.returncode in (0, 130, -signal.SIGINT) and "Traceback" not in rest, rest
        finally:
            process.kill()
