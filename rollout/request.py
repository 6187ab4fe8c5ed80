"""What goes into an engine and what comes out: tokens in; tokens, log-probs and where they came from out."""

import math
from dataclasses import dataclass

import numpy as np

GREEDY = 0.0


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 leave the distribution whole."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_new_tokens: int = 0  # no stop token is drawn before
    stop_token_ids: tuple[int, ...] = ()  # besides the policy's own
    stop_strings: tuple[str, ...] = ()
    top_log_probs: int = 0  # most likely tokens kept beside each sampled one
    processed_log_probs: bool = False  # keep the log-probs after top_k, top_p and min_p too

    def __post_init__(self) -> None:
        _require(
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "finite and at least 0 (0 is greedy)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (1 keeps every token)"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 keeps every token)"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1 (0 keeps every token)"),
            (
                "min_new_tokens",
                self.min_new_tokens,
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"from 0 to max_new_tokens ({self.max_new_tokens})",
            ),
            ("stop_token_ids", self.stop_token_ids, all(token >= 0 for token in self.stop_token_ids), "at least 0"),
            ("stop_strings", self.stop_strings, all(self.stop_strings), "without an empty string"),
            ("top_log_probs", self.top_log_probs, self.top_log_probs >= 0, "at least 0 (0 keeps none)"),
        )


@dataclass(frozen=True)
class Request:
    """A prompt and how often to complete it.

    (seed, step, prompt, sample, position) addresses every random draw (design A8): seed in 64 bits, the others in 32.
    """

    request_id: int
    prompt_ids: np.ndarray  # int64 [prompt length]
    num_samples: int
    sampling: SamplingParams
    seed: int
    step: int = 0
    prompt: int = 0
    full_vocab_samples: tuple[int, ...] = ()  # samples whose log-probs over the whole vocabulary are kept

    def __post_init__(self) -> None:
        kept = self.full_vocab_samples
        _require(
            ("prompt length", len(self.prompt_ids), len(self.prompt_ids) >= 1, "at least 1 token"),
            ("num_samples", self.num_samples, self.num_samples >= 1, "at least 1"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "from 0 to 2^64 - 1"),
            ("step", self.step, 0 <= self.step < 2**32, "from 0 to 2^32 - 1"),
            ("prompt", self.prompt, 0 <= self.prompt < 2**32, "from 0 to 2^32 - 1"),
            ("full_vocab_samples", kept, all(0 <= s < self.num_samples for s in kept), "samples below num_samples"),
        )


@dataclass(frozen=True)
class Completion:
    """One sampled answer. The token that stopped it is its last."""

    request_id: int
    sample: int
    token_ids: np.ndarray  # int64 [n]
    log_probs: np.ndarray  # float32 [n], at the request's temperature, before top-p and top-k
    policy_versions: np.ndarray  # int64 [n], version of the weights each token was drawn with
    finish_reason: str  # stop, length or abort
    full_log_probs: np.ndarray | None = None  # float32 [n, V]
    processed_log_probs: np.ndarray | None = None  # float32 [n], of the truncated and renormalised distribution
    top_token_ids: np.ndarray | None = None  # int64 [n, k], most likely first
    top_log_probs: np.ndarray | None = None  # float32 [n, k], like log_probs
    # Of each token of the sequence but the last; -1 and NaN where nobody knows.
    routed_experts: np.ndarray | None = None  # int16 [tokens - 1, MoE layers, experts of a token]
    routed_weights: np.ndarray | None = None  # float32, shaped alike

    @classmethod
    def unstarted(cls, request: Request, sample: int) -> "Completion":
        """A sample that was aborted before its first token."""
        none = np.zeros(0, dtype=np.int64)
        return cls(request.request_id, sample, none, none.astype(np.float32), none, "abort")


def _require(*rules: tuple[str, object, bool, str]) -> None:
    for name, got, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name} = {got}: must be {rule}")
