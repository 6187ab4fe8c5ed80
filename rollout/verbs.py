"""What every rollout engine can do, whoever computes: the local engine, vLLM or SGLang."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from rollout.request import Completion, Request


class EngineDied(RuntimeError):
    """The server behind an engine is gone, and with it what it ran; a new engine can take over."""


class RolloutEngine(Protocol):
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Runs until all are answered; completions by request, then by sample. Raises ValueError, with nothing
        submitted, when a request could never run. Other verbs may be called from another thread meanwhile."""
        ...

    def abort(self, request_id: int) -> None:
        """Its unfinished samples come back from `generate` with what they have, as "abort"."""
        ...

    def pause(self) -> None:
        """Returns when no token is being computed; none is until `resume`. Nothing that runs is lost."""
        ...

    def resume(self) -> None: ...

    def load_weights(self, tensors: dict[str, Tensor], policy_version: int) -> None:
        """Takes the family's tensors, by their Hugging Face names, as the weights of every later token. Prefixes cached
        under older weights are never read again. Raises ValueError when they do not fit, and the engine with it."""
        ...

    def weights_digest(self) -> str:
        """Digest of the weights the engine computes with, as `policy.digest.weights_digest` has it."""
        ...

    def describe(self) -> dict[str, object]: ...
