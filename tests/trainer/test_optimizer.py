"""Weight decay and learning-rate schedules."""

import pytest
import torch
from torch import nn

from trainer.config import TrainerConfig
from trainer.optimizer import build_optimizer, warmup_constant, warmup_cosine


def test_decay_shrinks_matrices_only() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
    optimizer = build_optimizer(layer, TrainerConfig(learning_rate=0.1, weight_decay=0.5))
    layer.weight.grad, layer.bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.full((2, 2), 0.95))
    assert torch.equal(layer.bias, torch.ones(2))


def test_a_step_is_the_one_of_a_fresh_adamw() -> None:
    torch.manual_seed(0)
    ours, plain = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    plain.load_state_dict(ours.state_dict())
    config = TrainerConfig(learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.99))
    optimizers = [
        build_optimizer(ours, config),
        torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.1, betas=(0.9, 0.99)),
    ]
    for _ in range(3):
        gradient = torch.randn(3, 3)
        ours.weight.grad, plain.weight.grad = gradient, gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours.weight, plain.weight)


def test_frozen_parameters_are_left_out() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    optimizer = build_optimizer(layer, TrainerConfig())
    assert layer.bias not in optimizer.state
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]


def test_warmup_then_constant() -> None:
    schedule = warmup_constant(0.4, 4)
    assert [schedule(step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert warmup_constant(0.4, 0)(0) == 0.4


def test_warmup_then_cosine_to_a_tenth() -> None:
    schedule = warmup_cosine(1.0, 2, 7)
    # Halfway through the cosine (step 4) lies the mean of 1 and 0.1.
    assert [schedule(step) for step in (0, 1, 2, 4, 6, 9)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
