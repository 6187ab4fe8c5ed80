"""How the policy is updated: micro-batches, optimizer and the clipped objective."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainerConfig(BaseModel):
    """The `trainer` section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threads: int | None = Field(None, ge=1, description="CPU threads of the trainer; null uses every core, at most 4.")
    token_budget: int = Field(
        8192, ge=1, description="Most tokens in a micro-batch; a longer sequence gets a micro-batch of its own."
    )
    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False, description="AdamW's step size after the warmup.")
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps over which the learning rate rises from 0.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's decay rates of the two moment averages.")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="AdamW's decay, on weight matrices only.")
    clip_grad_norm: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Gradients with a larger total norm are scaled down to it."
    )
    clip_ratio_low: float = Field(
        0.2, gt=0, lt=1, description="The ratio of new to old probability is clipped below 1 minus this."
    )
    clip_ratio_high: float = Field(
        0.28, gt=0, allow_inf_nan=False, description="The ratio of new to old probability is clipped above 1 plus this."
    )
