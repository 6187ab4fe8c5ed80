"""How completions are sampled: engine workers, their budgets and the sampling parameters."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from rollout.sglang_engine.config import SglangConfig


class RolloutConfig(BaseModel):
    """The `rollout` section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: Literal["local", "vllm", "sglang"] = Field(
        "local", description="Who samples: the aligned local engine, or vLLM or SGLang with their own kernels."
    )
    workers: int = Field(1, ge=1, description="Engine processes that share the prompts of a step.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads per worker; null gives each worker cores // workers, at least 1."
    )
    max_batch: int = Field(256, ge=1, description="Most sequences that a worker decodes at once.")
    prefill_tokens: int = Field(2048, ge=16, description="Most prompt tokens that one engine step processes.")
    memory_mb: int = Field(512, ge=1, description="MiB per worker for key-value blocks and recurrent states.")
    prefix_cache: bool = Field(True, description="Compute the beginning that prompts share once; moves no bit.")
    speculative_tokens: int = Field(
        0, ge=0, le=15, description="Tokens drafted by looking up what followed the last ones before; moves no bit."
    )
    decode_graphs: bool = Field(True, description="Record decode steps and replay them; moves no bit.")
    max_new_tokens: int = Field(96, ge=1, description="Longest completion, in tokens; longer ones are truncated.")
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Divides the logits, in the engine and in the trainer alike."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the likeliest tokens that hold this much probability; 1 is off."
    )
    top_k: int = Field(0, ge=0, description="Sample from this many likeliest tokens; 0 is off.")
    on_new_weights: Literal["reprefill", "continue"] = Field(
        "reprefill",
        description="What running sequences do when new weights arrive: compute what they cached again, so that every "
        "token is one that a whole forward of its version gives, or go on from what older weights have cached.",
    )
    vllm_aligned: bool = Field(
        False,
        description="vLLM computes and draws with Lockstep's own operators, so that completions are the local engine's "
        "and log-probs the trainer's, in every bit. Ring-linear needs it: vLLM has no class of its own for that.",
    )
    sleep_when_idle: bool = Field(
        False, description="vLLM on a GPU that the trainer shares: leave its memory to the trainer between batches."
    )
    sglang: SglangConfig = SglangConfig()
    routing_replay: Literal["none", "experts", "weights"] = Field(
        "none",
        description="Engines record which experts each token is sent to, and the trainer's forward sends it to the "
        "same; with weights, also how much each of them counts. For mixtures whose trainer and engine do not agree in "
        "every bit.",
    )

    @property
    def is_aligned(self) -> bool:
        """Whether the engine computes with the trainer's operators."""
        return self.engine == "local" or (self.engine == "vllm" and self.vllm_aligned)
