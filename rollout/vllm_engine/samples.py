"""Requests on their way into vLLM, one for each sample, and what has come back of them."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rollout.request import Completion, Request
from rollout.routes import completion_fields
from rollout.sample_seed import sample_seed

if TYPE_CHECKING:
    from vllm import SamplingParams as VllmParams
    from vllm.inputs.engine import TokensInput


@dataclass(frozen=True)
class Wish:
    """What a sample keeps beside the log-probs of its tokens."""

    top: int = 0
    processed: bool = False
    full_vocab: bool = False


@dataclass(frozen=True)
class Drawn:
    """One token of one sample, with the fields of `Completion`."""

    token_id: int
    log_prob: float
    processed_log_prob: float | None = None
    top_token_ids: np.ndarray | None = None  # [k]
    top_log_probs: np.ndarray | None = None  # [k]
    full_log_probs: np.ndarray | None = None  # [V]


@dataclass
class Sample:
    """One completion in the making."""

    request: Request
    sample: int
    drawn: list[Drawn] = field(default_factory=list)
    policy_versions: list[int] = field(default_factory=list)

    def append(self, drawn: Drawn, policy_version: int) -> None:
        self.drawn.append(drawn)
        self.policy_versions.append(policy_version)

    @property
    def name(self) -> str:
        return f"{self.request.request_id}, sample {self.sample}"

    @property
    def wish(self) -> Wish:
        sampling = self.request.sampling
        full_vocab = self.sample in self.request.full_vocab_samples
        return Wish(sampling.top_log_probs, sampling.processed_log_probs, full_vocab)

    @property
    def computed(self) -> int:
        """Tokens of the sequence but the last, which is drawn and not fed."""
        return len(self.request.prompt_ids) + len(self.drawn) - 1

    @property
    def token_ids(self) -> list[int]:
        return [each.token_id for each in self.drawn]

    def finish(self, finish_reason: str, routes: np.ndarray | None = None) -> Completion:
        """routes: of all its tokens but the last, where they are recorded."""
        if not self.drawn:
            return Completion.unstarted(self.request, self.sample)
        drawn, wish = self.drawn, self.wish
        return Completion(
            request_id=self.request.request_id,
            sample=self.sample,
            token_ids=np.array(self.token_ids, dtype=np.int64),
            log_probs=np.array([each.log_prob for each in drawn], dtype=np.float32),
            policy_versions=np.array(self.policy_versions, dtype=np.int64),
            finish_reason=finish_reason,
            processed_log_probs=np.array([each.processed_log_prob for each in drawn], np.float32)
            if wish.processed
            else None,
            top_token_ids=_stacked([each.top_token_ids for each in drawn]),
            top_log_probs=_stacked([each.top_log_probs for each in drawn]),
            full_log_probs=_stacked([each.full_log_probs for each in drawn]),
            **completion_fields(routes),
        )


def _stacked(rows: list[np.ndarray | None]) -> np.ndarray | None:
    """None where no row was wished for."""
    kept = [row for row in rows if row is not None]
    return np.stack(kept) if kept else None


def vllm_params(request: Request, sample: int, stop_token_ids: tuple[int, ...], seeded: bool) -> "VllmParams":
    """stop_token_ids: the policy's own; seeded: vLLM draws, from a generator of the sample's own."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    wanted = request.sampling
    return VllmParams(
        max_tokens=wanted.max_new_tokens,
        min_tokens=wanted.min_new_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        seed=sample_seed(request, sample) if seeded else None,
        stop_token_ids=[*stop_token_ids, *wanted.stop_token_ids],
        stop=list(wanted.stop_strings),
        detokenize=bool(wanted.stop_strings),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def vllm_prompt(request: Request, cache_salt: str) -> "TokensInput":
    """cache_salt: cached prefixes are shared only between requests of the same one."""
    from vllm.inputs.engine import tokens_input

    return tokens_input(request.prompt_ids.tolist(), cache_salt=cache_salt)
