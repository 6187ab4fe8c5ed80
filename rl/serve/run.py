"""Opens a policy and serves it until it is interrupted."""

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvicorn
from rich.console import Console

from rl.export import policy_folder
from rl.local_engine import open_engine
from rl.serve.app import Server
from rl.serve.prompts import Prompts
from rl.serve.worker import EngineThread
from rollout.config import RolloutConfig
from rollout.request import Request, SamplingParams

GRACE_SECONDS = 5


@dataclass(frozen=True)
class ServeSettings:
    policy: Path
    host: str
    port: int
    name: str | None
    api_key: str | None
    max_open: int
    max_batch: int
    memory_mb: int
    speculative_tokens: int


def open_server(settings: ServeSettings) -> Server:
    """Raises ValueError when the folder holds no policy or the memory is too small for it."""
    folder = policy_folder(settings.policy)
    config = RolloutConfig(
        max_batch=settings.max_batch, memory_mb=settings.memory_mb, speculative_tokens=settings.speculative_tokens
    )
    engine, tokenizer = open_engine(folder, config)
    # So that kernels are compiled, which may take half a minute on a new machine, before a client waits.
    engine.generate([Request(0, np.zeros(1, dtype=np.int64), 1, SamplingParams(1), seed=0)])
    shape = engine.policy.config
    prompts = Prompts(folder, tokenizer, shape.vocab_size, shape.max_position_embeddings)
    name = settings.name or settings.policy.resolve().name
    return Server(EngineThread(engine, settings.max_open), prompts, name, settings.api_key)


def serve(settings: ServeSettings, console: Console) -> None:
    """Blocks until SIGINT or SIGTERM; open answers then get some seconds to end."""
    if settings.api_key is None and not _is_loopback(settings.host):
        raise ValueError(
            f"--host {settings.host} lets other machines in: set --api-key (or LOCKSTEP_API_KEY), or stay on 127.0.0.1"
        )
    listener = _listen(settings.host, settings.port)
    server = open_server(settings)
    host, port = listener.getsockname()[:2]
    console.print(
        f"{server.model} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 "
        f"({server.worker.engine.describe()['blocks']} blocks of key-value memory)",
        markup=False, soft_wrap=True, highlight=False,
    )  # fmt: skip
    options = uvicorn.Config(
        server.app(), log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS, server_header=False
    )
    uvicorn.Server(options).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Port 0 takes a free one. Raises ValueError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # before the address is printed: whoever reads it may come at once
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror or error}; choose --port 0") from None
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
