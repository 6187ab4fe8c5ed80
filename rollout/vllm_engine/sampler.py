"""vLLM's sampler, with a record of what the trainer needs beside each token it draws.

vLLM can report log-probs before the temperature or after top-k and top-p; a policy gradient needs those between the
two, and a request may ask for both. So the rows are taken where they pass, once per step, before a limit touches them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

import ops
from rollout.routes import RouteType
from rollout.vllm_engine.routes import RouteRecorder
from rollout.vllm_engine.samples import Drawn, Sample, Wish
from rollout.vllm_engine.taps import RouterTaps, recorder

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase


GREEDY = 1e-5  # vLLM takes a temperature below this for 0


class RecordingSampler(Sampler):
    """runner: the model runner, whose input batch knows the request of every row.

    samples: by vLLM's own id of a request; requests without an entry have no wish. routes: of the tokens of each
    request, where they are recorded.
    """

    def __init__(self, runner: Any, vocab_size: int) -> None:
        super().__init__("processed_logprobs")
        self.runner, self.vocab_size = runner, vocab_size
        self.samples: dict[str, Sample] = {}
        self.drawn: dict[str, Drawn] = {}
        self.routes: RouteRecorder | None = None
        self._processed: Tensor | None = None

    def forward(
        self,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: Any = None,
    ) -> SamplerOutput:
        """logits: [B, V or wider], in the order of the input batch."""
        rows = self.log_probs(logits[:, : self.vocab_size], sampling_metadata.temperature)
        output = super().forward(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        tokens = output.sampled_token_ids.long()
        limited = rows if self._processed is None else self._processed
        self.record(rows, limited.gather(1, tokens)[:, 0], tokens[:, 0], range(len(rows)))
        return output

    def sample(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Greedy requests alone pass no limit, and vLLM then gives no processed log-probs."""
        sampled, self._processed = super().sample(logits, sampling_metadata, logprobs_mode_override)
        return sampled, self._processed

    def log_probs(self, logits: Tensor, temperature: Tensor | None) -> Tensor:
        """float32 [B, V] at each request's temperature [B], greedy ones at 1."""
        if temperature is None:
            temperature = logits.new_ones(len(logits), dtype=torch.float32)
        temperature = torch.where(temperature < GREEDY, 1.0, temperature)
        return (logits.float() / temperature[:, None]).log_softmax(-1)

    def take(self) -> dict[str, Drawn]:
        """What was drawn since the last call, by vLLM's id of the request."""
        drawn, self.drawn = self.drawn, {}
        return drawn

    def record(self, rows: Tensor, processed: Tensor, tokens: Tensor, kept: Sequence[int]) -> None:
        """rows [B, V] and what was drawn from them: tokens [B] and their processed log-probs [B]; kept: which of them
        vLLM keeps."""
        if self.routes:
            self.routes.record()
        names = self.runner.input_batch.req_ids
        wishes = [self.samples[name].wish if name in self.samples else Wish() for name in names]
        top_ids, top = (x.cpu().numpy() for x in ops.most_likely(rows, max((wish.top for wish in wishes), default=0)))
        token_ids, limited = tokens.tolist(), processed.tolist()
        log_probs = rows.gather(1, tokens[:, None])[:, 0].tolist()
        for row in kept:
            wish = wishes[row]
            self.drawn[names[row]] = Drawn(
                token_ids[row],
                log_probs[row],
                limited[row] if wish.processed else None,
                top_ids[row, : wish.top] if wish.top else None,
                top[row, : wish.top] if wish.top else None,
                rows[row].cpu().numpy().copy() if wish.full_vocab else None,
            )


def install(worker: "WorkerBase", route_type: RouteType | None) -> RecordingSampler:
    """Puts the recording sampler in place of the worker's own. route_type: of routes to record, if any."""
    runner: Any = getattr(worker, "worker", worker).model_runner
    runner.sampler = RecordingSampler(runner, runner.model_config.get_vocab_size())
    if route_type:
        runner.sampler.routes = recorder(runner, route_type, RouterTaps(runner.model).read)
    return runner.sampler
