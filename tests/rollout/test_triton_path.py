"""The whole policy on the Triton path: what the engine records is what the trainer computes, bit for bit.

In the interpreter under the adversarial dot, whose rounding follows the shape of a tile, and in a shuffled order of
programs; on a GPU for real.
"""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ops.dispatch import Path, force
from tests.ops.kernels.harness import DEVICE, adversarial
from tests.rollout.tiny import make_engine, make_policy, make_request
from trainer.batch import TrainSample
from trainer.config import TrainerConfig
from trainer.trainer import Trainer


@pytest.fixture(autouse=True)
def _triton_path() -> Iterator[None]:
    with force(Path.TRITON):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_engine_and_trainer_agree_bit_for_bit(dtype: torch.dtype) -> None:
    """Prompts that end before, at and after the edge of a chunk; samples that cross it; one packed training batch."""
    policy = copy.deepcopy(make_policy(group=3, dtype=dtype)).to(DEVICE)
    requests = [
        make_request(0, length=14, num_samples=2, max_new_tokens=4),
        make_request(1, length=33, num_samples=1, max_new_tokens=3, full_vocab_samples=(0,)),
    ]
    engine = make_engine(policy, prefill_tokens=16, max_batch=4)
    engine.policy.lm_head.data = engine.policy.lm_head.data.to(dtype)  # as a GPU stores it
    with adversarial(order_seed=3):
        completions = engine.generate(requests)
    prompts = {request.request_id: request.prompt_ids for request in requests}
    samples = [
        TrainSample(
            np.concatenate([prompts[each.request_id], each.token_ids]), len(prompts[each.request_id]), each.log_probs,
            advantage=1.0 - 2.0 * each.sample,
        )
        for each in completions
    ]  # fmt: skip
    trainer = Trainer(policy, TrainerConfig(token_budget=128), temperature=requests[0].sampling.temperature)
    with adversarial(order_seed=5):
        result = trainer.compute(samples)
        for each, log_probs in zip(completions, result.log_probs, strict=True):
            assert np.array_equal(each.log_probs, log_probs), f"request {each.request_id} sample {each.sample}"
        full = trainer.full_log_probs(samples[-1])
    assert completions[-1].full_log_probs is not None
    assert np.array_equal(full, completions[-1].full_log_probs)
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert len(gradients) == len(list(policy.parameters()))
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in gradients)
    trainer.discard()
