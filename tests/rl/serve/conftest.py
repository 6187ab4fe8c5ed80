"""A tiny policy behind a real server on a free port, for the whole folder."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import uvicorn
from openai import OpenAI

from policy.checkpoint import save_policy
from policy.config import PolicyConfig
from policy.tokenizer import train_tokenizer
from policy.transformer import Policy
from rl.serve.app import Server
from rl.serve.run import ServeSettings, open_server

POSITIONS, MAX_OPEN = 256, 100
TEXTS = ["So the answer is 42. Öl, naïve, 日本語 and 🙂 are text too.\n"] * 3


@pytest.fixture(scope="session")
def served_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, so it says anything: whole and broken characters alike."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = train_tokenizer(TEXTS, 300)
    config = PolicyConfig.from_hf(
        {
            "model_type": "bailing_moe_linear",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "layer_group_size": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.3,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
            "lockstep": {"chunk_size": 16},
        }
    )
    policy = Policy(config, torch.float32)
    policy.initialize(seed=3)
    save_policy(folder, policy)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(served_policy: Path) -> Server:
    return open_server(
        ServeSettings(
            policy=served_policy, host="127.0.0.1", port=0, name=None, api_key=None, max_open=MAX_OPEN, max_batch=16,
            memory_mb=8, speculative_tokens=0,
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def url(server: Server) -> Iterator[str]:
    with running(server) as address:
        yield address


class running:
    """Serves in a thread; the value is the address."""

    def __init__(self, server: Server) -> None:
        self.uvicorn = uvicorn.Server(uvicorn.Config(server.app(), port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
