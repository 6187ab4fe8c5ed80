"""One sample of a request on its way through the engine: what it has, wherever that lies at the moment."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rollout.request import Completion, Request
from rollout.routes import completion_fields
from rollout.stop_strings import StopStrings

# What is recorded of every token, in arrays over the positions of a sequence; of a prompt only the tokens count.
RECORDS: dict[str, type] = {"tokens": np.int64, "log_probs": np.float32, "processed": np.float32, "versions": np.int64}


@dataclass(eq=False)
class Sequence:
    request: Request
    sample: int
    followers: list[tuple[int, int]] = field(default_factory=list)  # (sample, slot) that start from this one's prompt
    records: dict[str, np.ndarray] = field(default_factory=dict)  # while it has no slot
    routes: np.ndarray | None = None  # likewise: of the first length - 1 tokens, where they are recorded
    stop_strings: StopStrings | None = None
    full_rows: list[np.ndarray] = field(default_factory=list)  # of each new token, where they are asked for
    top: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # ids and log-probs, likewise

    @classmethod
    def unstarted(cls, request: Request, sample: int, stop_strings: StopStrings | None) -> "Sequence":
        prompt = request.prompt_ids.astype(np.int64)
        records: dict[str, np.ndarray] = {name: np.zeros(len(prompt), dtype) for name, dtype in RECORDS.items()}
        records["tokens"] = prompt
        return cls(request, sample, records=records, stop_strings=stop_strings)

    @property
    def is_watched(self) -> bool:
        """Something is done for each of its tokens that arrays over all slots do not do."""
        return bool(self.stop_strings or self.keeps_full_rows or self.request.sampling.top_log_probs)

    @property
    def keeps_full_rows(self) -> bool:
        return self.sample in self.request.full_vocab_samples

    def completion(self, records: Mapping[str, np.ndarray], finish_reason: str, known: int = 0) -> Completion:
        """From the records over all its positions; without the first `known` new tokens."""
        begin, sampling = len(self.request.prompt_ids) + known, self.request.sampling
        new = {name: values[begin:].copy() for name, values in records.items()}
        rows, top = self.full_rows[known:], self.top[known:]
        return Completion(
            request_id=self.request.request_id,
            sample=self.sample,
            token_ids=new["tokens"],
            log_probs=new["log_probs"],
            policy_versions=new["versions"],
            finish_reason=finish_reason,
            full_log_probs=np.stack(rows) if rows else None,
            processed_log_probs=new["processed"] if sampling.processed_log_probs else None,
            top_token_ids=np.stack([ids for ids, _ in top]) if top else None,
            top_log_probs=np.stack([values for _, values in top]) if top else None,
            **completion_fields(self.routes),
        )
