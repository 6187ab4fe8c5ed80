"""What a run reports of itself, and at which values it says so, stops, or corrects."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from rl.metrics.names import unknown_metric

# Decided by loop.on_mismatch, which is the promise itself.
PROMISED = ("mismatch/tokens_unequal", "mismatch/full_vocab_unequal")
# The keys of rl.metrics.peers.PEERS.
Peer = Literal["verl", "verl-2026-01", "slime", "nemo-rl", "trl", "prime-rl", "skyrl", "openrlhf", "tinker"]


class AlarmConfig(BaseModel):
    """One alarm: sounds when the metric leaves the bounds, or is not a finite number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    above: float | None = Field(None, allow_inf_nan=False, description="Sounds above this.")
    below: float | None = Field(None, allow_inf_nan=False, description="Sounds below this.")
    action: Literal["warn", "stop", "correct"] = Field(
        "warn",
        description="warn says it; stop writes a checkpoint and ends the run; correct switches trainer.correction on.",
    )

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.above is None and self.below is None:
            raise ValueError("an alarm needs a bound: give above, below or both")
        if self.above is not None and self.below is not None and self.above < self.below:
            raise ValueError(f"above = {self.above} is less than below = {self.below}, so that every value would sound")
        return self


class WandbConfig(BaseModel):
    """Weights & Biases; needs the extra `wandb`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    project: str = Field(min_length=1, description="Project that the run is shown in.")
    entity: str | None = Field(None, min_length=1, description="User or team; null takes that of the login.")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline writes into the run folder only; `wandb sync` brings it to the server later."
    )


class MonitorConfig(BaseModel):
    """The `monitor` section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[Peer, ...] = Field(
        (), description="Systems whose mismatch metrics are reported too, by their own names and definitions."
    )
    alarms: dict[str, AlarmConfig | None] = Field(
        default_factory=dict,
        description="Alarms by metric, such as mismatch/k3: {above: 0.05, action: stop}; null removes a default one.",
    )
    wandb: WandbConfig | None = Field(None, description="Show the metrics in Weights & Biases too.")
    prometheus: bool = Field(
        False, description="Show the metrics among those that Ray exports to Prometheus; needs the extra prometheus."
    )

    @field_validator("names")
    @classmethod
    def _one_verl(cls, names: tuple[Peer, ...]) -> tuple[Peer, ...]:
        if {"verl", "verl-2026-01"} <= set(names):
            raise ValueError("verl and verl-2026-01 give the same names to different values; keep one")
        return names

    @field_validator("alarms")
    @classmethod
    def _known_metrics(
        cls, alarms: dict[str, AlarmConfig | None], info: ValidationInfo
    ) -> dict[str, AlarmConfig | None]:
        for name in alarms:
            if name in PROMISED:
                raise ValueError(f"{name} is decided by loop.on_mismatch (stop or warn); remove the alarm")
            if problem := unknown_metric(name, info.data.get("names", ())):
                raise ValueError(problem)
        return alarms


def correcting(config: MonitorConfig) -> dict[str, AlarmConfig]:
    """The alarms that change the loss."""
    return {name: rule for name, rule in config.alarms.items() if rule is not None and rule.action == "correct"}
