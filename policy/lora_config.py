"""Which weights a LoRA run trains, and how large a change it can make."""

from pydantic import BaseModel, ConfigDict, Field, field_validator


class LoraConfig(BaseModel):
    """The `lora` section of a recipe. `add_adapters` in `policy.lora` reads it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(ge=1, description="Rank of the change that is trained beside a frozen weight.")
    alpha: float = Field(gt=0, allow_inf_nan=False, description="The change is multiplied by alpha / rank.")
    targets: tuple[str, ...] = Field(
        min_length=1,
        description="Hugging Face names of the linear layers that get an adapter, such as query_key_value, dense, "
        "gate_proj, up_proj and down_proj (dense MLPs and shared experts; not the routed experts).",
    )
    dropout: float = Field(0.0, description="Only 0: with dropout, trainer and sampler would differ.")

    @field_validator("dropout")
    @classmethod
    def _none(cls, dropout: float) -> float:
        if dropout:
            raise ValueError(f"must be 0, got {dropout}: with dropout, trainer and sampler compute different policies")
        return dropout

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in targets if targets.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is listed twice; name every target once")
        return targets
