"""Which SGLang server samples: one that the engine starts and ends, or one that runs already."""

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator


class SglangConfig(BaseModel):
    """The `rollout.sglang` section of a recipe. The key of a server that asks for one is in no recipe, as those are
    kept with their runs, but in the environment variable LOCKSTEP_SGLANG_API_KEY."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = Field(
        None, description="Of a server that runs already, like http://127.0.0.1:30000; null starts one for each worker."
    )
    python: str | None = Field(
        None, description="Interpreter of the environment with SGLang; null is the one that runs Lockstep."
    )
    arguments: tuple[str, ...] = Field(
        (), description="Further arguments of sglang.launch_server, like [--enable-deterministic-inference]."
    )
    weights: Literal["disk", "distributed"] = Field(
        "disk", description="How new weights reach the server: by a file, or by a broadcast (NCCL, on a CPU Gloo)."
    )
    weights_folder: Path | None = Field(
        None,
        description="Where files of weights are written, seen by the server too; null is /dev/shm if there is one.",
    )
    start_seconds: float = Field(600.0, gt=0, description="Longest wait for a server to start.")
    answer_seconds: float = Field(
        1800.0, gt=0, description="Longest wait for any one answer, pauses included; then the server counts as dead."
    )

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        if url is not None and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
            raise ValueError(f"must be http://HOST:PORT or https://HOST:PORT, got {url}")
        return url and url.rstrip("/")
