"""An engine in this process, without Ray: for the commands that only sample from a policy."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from policy.checkpoint import load_policy
from policy.machine import choose_device
from policy.tokenizer import load_tokenizer
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Completion, Request


def open_engine(folder: Path, config: RolloutConfig) -> tuple[Engine, PreTrainedTokenizerBase]:
    """The policy in a Hugging Face folder. Raises ValueError when it is none."""
    policy = load_policy(folder).to_working_dtype(choose_device("auto"))
    tokenizer = load_tokenizer(folder)

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    return Engine(policy, config, decode=decode), tokenizer


def stream(engine: Engine, requests: Sequence[Request]) -> Iterator[Completion]:
    """Completions as they end, in no particular order. Raises ValueError when a request could never run."""
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        yield from engine.step()
