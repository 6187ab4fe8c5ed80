"""A policy small enough to check by hand, with the interface of `policy.transformer.Policy`, and samples for it."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.batch import TrainSample
from trainer.config import TrainerConfig
from trainer.trainer import Trainer

VOCAB, DIM = 11, 6


class TinyPolicy(nn.Module):
    """Embedding of the token plus embedding of its position; tied head; one vector and one buffer."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.config, self.device = SimpleNamespace(chunk_size=16), torch.device("cpu")
        self.embedding = nn.Embedding(VOCAB, dim)
        self.position = nn.Embedding(32, dim)
        self.scale = nn.Parameter(torch.ones(dim))
        self.lm_head = nn.Linear(dim, VOCAB, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.register_buffer("offset", torch.randn(dim))

    def forward(self, input_ids: Tensor, layout, routing=None) -> Tensor:
        hidden = self.embedding(input_ids) + self.position(layout.position_ids)
        return (hidden + self.offset).tanh() * self.scale

    def log_probs(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        full = (self.lm_head(hidden) / temperature).log_softmax(-1)
        entropy = -(full.exp() * full).sum(-1).detach()
        return full.gather(1, targets[:, None]).squeeze(1), entropy

    def cross_entropy(self, hidden: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
        return -(row_weights * self.log_probs(hidden, targets, 1.0)[0]).sum()

    def full_log_probs(self, hidden: Tensor, temperature: float) -> Tensor:
        return (self.lm_head(hidden) / temperature).log_softmax(-1)


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    def make(dim: int = DIM, temperature: float = 0.7, **config) -> Trainer:
        torch.manual_seed(0)
        return Trainer(TinyPolicy(dim), TrainerConfig(**{"learning_rate": 0.05, **config}), temperature)

    return make


@pytest.fixture
def samples() -> list[TrainSample]:
    """Seven samples of 3 to 12 tokens."""
    random = np.random.default_rng(0)
    made = []
    for prompt_length, completion_length in [(1, 2), (4, 1), (2, 7), (5, 5), (3, 9), (1, 11), (6, 2)]:
        input_ids = random.integers(0, VOCAB, prompt_length + completion_length)
        rollout_log_probs = random.uniform(-3, -1.5, completion_length).astype(np.float32)
        made.append(TrainSample(input_ids, prompt_length, rollout_log_probs, float(random.normal())))
    return made
