"""The local engine's draws inside vLLM: addressed numbers, the same limits, the same log-probs, bit for bit."""

from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata

import ops
from rollout.routes import RouteType
from rollout.vllm_engine.sampler import RecordingSampler
from rollout.vllm_engine.samples import Sample
from rollout.vllm_engine.taps import recorder

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase

NEVER = -1  # a token id that no token has


class AlignedSampler(RecordingSampler):
    """What vLLM hands it as logits are final hidden states."""

    def __init__(self, runner: Any) -> None:
        policy = runner.model.policy
        super().__init__(runner, policy.config.vocab_size)
        self.policy, self.stop_token_ids = policy, policy.config.stop_token_ids

    def forward(
        self,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: Any = None,
    ) -> SamplerOutput:
        """logits: hidden states FP32 [B, D], in the order of the input batch."""
        samples = [self.samples[name] for name in self.runner.input_batch.req_ids]
        unfinished = self.runner.discard_request_mask.np[: len(samples)]  # only a part of their prompt is computed
        tokens, _, rows, processed = self._draw(samples, logits)
        self.record(rows, processed, tokens, np.flatnonzero(~unfinished).tolist())
        return SamplerOutput(sampled_token_ids=tokens[:, None].int(), logprobs_tensors=None)

    def _draw(self, samples: list[Sample], hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wanted = [sample.request.sampling for sample in samples]

        def setting(values: list[Any], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=hidden.device)

        return ops.sample(
            hidden,
            self.policy.lm_head,
            setting([each.temperature for each in wanted]),
            setting([each.top_p for each in wanted]),
            setting([each.top_k for each in wanted], torch.int64),
            setting([each.min_p for each in wanted]),
            uniforms(samples).to(hidden.device),
            self.policy.dtype,
            self._banned(samples, hidden.device),
            self.policy.packed_head(),
        )

    def _banned(self, samples: list[Sample], device: torch.device) -> Tensor | None:
        """int64 [B, K]: stop tokens, where a sample is too short for them."""
        stops = [self._stops(sample) for sample in samples]
        if not any(stops):
            return None
        width = max(len(each) for each in stops)
        return torch.tensor([[*each, *[NEVER] * (width - len(each))] for each in stops], device=device)

    def _stops(self, sample: Sample) -> tuple[int, ...]:
        sampling = sample.request.sampling
        too_early = len(sample.drawn) < sampling.min_new_tokens
        return (*self.stop_token_ids, *sampling.stop_token_ids) if too_early else ()


def uniforms(samples: list[Sample]) -> Tensor:
    """FP64 [B]: the number at the address of each sample's next token."""
    parts = []
    for seed, same in groupby(samples, lambda sample: sample.request.seed):
        addresses = [
            (len(each.request.prompt_ids) + len(each.drawn), each.sample, each.request.prompt, each.request.step)
            for each in same
        ]
        parts.append(ops.addressed_uniform(seed, np.array(addresses, dtype=np.uint32).T))
    return torch.cat(parts)


def install(worker: "WorkerBase", route_type: RouteType | None) -> AlignedSampler:
    """Puts it in place of the worker's own, and hands it hidden states: it makes log-probs of them itself. route_type:
    of routes to record, if any."""
    runner: Any = getattr(worker, "worker", worker).model_runner
    runner.model.compute_logits = lambda hidden_states: hidden_states
    runner.sampler = AlignedSampler(runner)
    if route_type:
        runner.model.records_routes = True
        runner.sampler.routes = recorder(runner, route_type, runner.model.chosen)
    return runner.sampler
