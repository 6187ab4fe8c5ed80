"""How completions are sampled: engine workers, their budgets and the sampling parameters."""

from pydantic import BaseModel, ConfigDict, Field


class RolloutConfig(BaseModel):
    """The `rollout` section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(1, ge=1, description="Engine processes that share the prompts of a step.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads per worker; null gives each worker cores // workers, at least 1."
    )
    max_batch: int = Field(256, ge=1, description="Most sequences that a worker decodes at once.")
    prefill_tokens: int = Field(2048, ge=16, description="Most prompt tokens that one engine step processes.")
    memory_mb: int = Field(512, ge=1, description="MiB per worker for key-value blocks and recurrent states.")
    max_new_tokens: int = Field(96, ge=1, description="Longest completion, in tokens; longer ones are truncated.")
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Divides the logits, in the engine and in the trainer alike."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the likeliest tokens that hold this much probability; 1 is off."
    )
    top_k: int = Field(0, ge=0, description="Sample from this many likeliest tokens; 0 is off.")
