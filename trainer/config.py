"""How the policy is updated: micro-batches, optimizer and the clipped objective."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.correction_config import CorrectionConfig

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
    old_log_probs: Literal["auto", "rollout", "recomputed"] = Field(
        "auto",
        description="Denominator of the clipped ratio: the engine's record (report Eq. 5), or the trainer's own before "
        "the update (Eq. 6), which the correction then compares with the record; auto recomputes where the correction "
        "weighs tokens.",
    )
    correction: CorrectionConfig = CorrectionConfig()

    @model_validator(mode="after")
    def _weigh_once(self) -> Self:
        require_one_weighing(self.old_log_probs, self.correction)
        return self


def require_one_weighing(old_log_probs: str, correction: CorrectionConfig) -> None:
    """Raises ValueError where ratio and weight would both hold pi_train / pi_rollout."""
    if old_log_probs == "rollout" and correction.weighs:
        raise ValueError(
            f"old_log_probs = rollout with correction.method = {correction.method}: the ratio to the record would "
            "count twice, in the clipped ratio and as a weight; set old_log_probs to auto or recomputed"
        )
