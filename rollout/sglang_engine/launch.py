"""A server of our own: SGLang in a process of its own, on loopback, that ends when this one does."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from policy.config import PolicyConfig
from policy.families import RING_LINEAR
from rollout.config import RolloutConfig
from rollout.routes import RouteType
from rollout.sglang_engine.client import Client
from rollout.verbs import EngineDied

HERE = Path(__file__).parent
CPU_STUBS = HERE / "cpu_stubs"
LAST_LINES, LOG_BYTES = 20, 2**14  # of the server's log in an error
POLL_SECONDS = 0.2
END_SECONDS = 30.0
# SGLang ends a sequence two tokens before its context does.
SPARE_TOKENS = 2
INSTALL = (
    "set rollout.sglang.python to the interpreter of an environment with SGLang; .ci/sglang DIR makes one for CPUs"
)
REACH = "Start it, or set rollout.sglang.url to null; where it asks for a key, put that in LOCKSTEP_SGLANG_API_KEY"


class Server:
    """A started process, with its log in a file without a name.

    policy: a folder with config.json; the weights come later. Raises ValueError when the interpreter cannot be run.
    """

    def __init__(
        self, config: PolicyConfig, policy: Path, dtype: torch.dtype, rollout: RolloutConfig, cuda: bool
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        command = [rollout.sglang.python or sys.executable, "-P", str(HERE / "child.py")]
        command += server_arguments(config, policy, dtype, rollout, cuda, port)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=server_environment(cuda),
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise ValueError(
                f"rollout.sglang.python = {rollout.sglang.python}: cannot be run ({error}); {INSTALL}"
            ) from None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def last_words(self) -> str:
        log = self._log.fileno()
        end = os.pread(log, LOG_BYTES, max(0, os.fstat(log).st_size - LOG_BYTES))
        lines = end.decode("utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return "The last lines of its log:\n" + "\n".join(lines)

    def stop(self) -> None:
        """Ends the process and all that it has started; again is harmless."""
        if not self.has_ended:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(END_SECONDS)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._log.close()

    def epitaph(self, error: EngineDied) -> EngineDied:
        """The error with what the server said last, if it has ended."""
        return EngineDied(f"{error}. {self.last_words()}") if self.has_ended else error


def wait_until_healthy(client: Client, server: Server | None, seconds: float) -> None:
    """server: None for one that somebody else runs. Raises ValueError when it ends, or does not answer in time; one of
    our own is then stopped."""
    limit = time.monotonic() + seconds
    while not client.is_healthy():
        if server is not None and server.has_ended:
            raise ValueError(f"SGLang did not start ({INSTALL}). {server.last_words()}")
        if time.monotonic() > limit:
            remedy = REACH if server is None else server.last_words()
            if server is not None:
                server.stop()
            raise ValueError(
                f"no healthy SGLang server at {client.url} for {seconds:g} s (rollout.sglang.start_seconds). {remedy}"
            )
        time.sleep(POLL_SECONDS)


def refuse_unserved(config: PolicyConfig, rollout: RolloutConfig) -> None:
    """Raises ValueError for what a recipe asks and SGLang cannot do, before anything is started."""
    refusals = (
        (
            config.model_type == RING_LINEAR,
            f"it has no class for model_type {config.model_type}; set rollout.engine=local",
        ),
        (
            rollout.speculative_tokens > 0,
            f"rollout.speculative_tokens = {rollout.speculative_tokens}, but only the local engine drafts; set it to 0",
        ),
        (
            rollout.routing_replay == "weights",
            "rollout.routing_replay = weights, but it gives experts without their weights; set it to experts",
        ),
        (
            rollout.sglang.url is not None and rollout.workers > 1,
            f"rollout.workers = {rollout.workers}, but one server at rollout.sglang.url; set workers to 1",
        ),
    )
    for refused, reason in refusals:
        if refused:
            raise ValueError(f"rollout.engine = sglang: {reason}")
    if rollout.routing_replay != "none":
        RouteType(config, rollout)  # which a policy without mixtures does not have


def server_arguments(
    config: PolicyConfig, policy: Path, dtype: torch.dtype, rollout: RolloutConfig, cuda: bool, port: int
) -> list[str]:
    """policy: a folder with config.json; the weights come later."""
    values = {
        "model-path": policy,
        "load-format": "dummy",
        "dtype": str(dtype).removeprefix("torch."),
        "host": "127.0.0.1",
        "port": port,
        "context-length": config.max_position_embeddings + SPARE_TOKENS,
        "max-total-tokens": cached_tokens(config, dtype, rollout),
        "max-running-requests": rollout.max_batch,
        "log-level": "warning",
    }
    if not cuda:
        values |= {"device": "cpu", "attention-backend": "torch_native", "sampling-backend": "pytorch"}
    flags = {
        "skip-server-warmup": True,
        "sleep-on-idle": not cuda,  # else it takes a core from the trainer while it waits
        "skip-tokenizer-init": not any(policy.glob("tokenizer*")),
        "disable-radix-cache": not rollout.prefix_cache,
        "enable-return-routed-experts": rollout.routing_replay != "none",
        "disable-cuda-graph": not (cuda and rollout.decode_graphs),
        # With it a step is under way when weights arrive, and its token is then counted to the new ones.
        "disable-overlap-schedule": not cuda or rollout.on_new_weights == "continue",
    }
    named = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return [*named, *(f"--{name}" for name, on in flags.items() if on), *rollout.sglang.arguments]


def server_environment(cuda: bool) -> dict[str, str]:
    environment = os.environ | {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    if cuda:
        return environment
    paths = [str(CPU_STUBS), *filter(None, [os.environ.get("PYTHONPATH")])]
    # More threads make SGLang's plain operators some 30 times slower.
    return environment | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def cached_tokens(config: PolicyConfig, dtype: torch.dtype, rollout: RolloutConfig) -> int:
    """Tokens whose keys and values rollout.memory_mb holds."""
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return rollout.memory_mb * 2**20 // token_bytes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
