"""AdamW and the learning-rate schedules."""

import math
from collections.abc import Callable

import torch
from torch import nn

from trainer.config import TrainerConfig

Schedule = Callable[[int], float]
"""The learning rate of the optimizer step that follows `step` finished ones."""

COSINE_FLOOR = 0.1


def build_optimizer(policy: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with weight decay on matrices only.

    The moments exist from the start, so that a checkpoint has the same tensors whether a parameter has had a
    gradient yet or not.
    """
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0, dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def warmup_constant(learning_rate: float, warmup_steps: int) -> Schedule:
    """Linear over `warmup_steps` steps up to `learning_rate`, then constant."""

    def schedule(step: int) -> float:
        return learning_rate * _warmup(step, warmup_steps)

    return schedule


def warmup_cosine(learning_rate: float, warmup_steps: int, total_steps: int) -> Schedule:
    """Linear over `warmup_steps` steps up to `learning_rate`, then half a cosine down to a tenth at the last step."""

    def schedule(step: int) -> float:
        progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
        return learning_rate * _warmup(step, warmup_steps) * (COSINE_FLOOR + (1 - COSINE_FLOOR) * cosine)

    return schedule


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / max(1, warmup_steps))
