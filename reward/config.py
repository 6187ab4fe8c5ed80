"""The reward section of a recipe: where the answer stands in a completion, and what a verification may cost."""

from pydantic import BaseModel, Field


class RewardConfig(BaseModel, extra="forbid", frozen=True):
    """Settings of `reward.pool.RewardPool`."""

    answer_marker: str = Field(
        default="\\boxed",
        min_length=1,
        description="What announces the answer. `\\boxed` takes the content of the last \\boxed{...}; any other text, "
        "such as `####` or `Answer:`, takes what follows its last occurrence on the same line.",
    )
    workers: int = Field(
        default=1,
        ge=1,
        description="Processes that verify symbolic answers. Integers never need one; none starts early.",
    )
    timeout_seconds: float = Field(
        default=5.0, gt=0, description="Seconds one symbolic answer may take before its worker is killed and replaced."
    )
    memory_mb: int = Field(
        default=1024,
        ge=256,
        description="Address space of one worker in MiB. Below 256 there is no room for sympy (about 60) and its work.",
    )
