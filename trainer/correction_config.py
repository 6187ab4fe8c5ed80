"""Which importance weights and masks correct the loss where trainer and sampler do not agree in every bit."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["none", "token_tis", "sequence_tis", "icepop", "kpop", "sequence_mask", "geometric_mask"]

# What bounds each method, with the values of its source: see trainer/correction.py.
BOUNDS: dict[str, dict[str, float]] = {
    "none": {},
    "token_tis": {"cap": 2.0},
    "sequence_tis": {"cap": 2.0},
    "icepop": {"low": 0.5, "high": 5.0},
    "kpop": {"max_binary_kl": 2.0},
    "sequence_mask": {"low": 0.5, "high": 2.0},
    "geometric_mask": {"low": 0.999, "high": 1.001},
}
_BOUND_NAMES = ("cap", "low", "high", "max_binary_kl")
WEIGHTING = frozenset(BOUNDS) - {"none", "geometric_mask"}


class CorrectionConfig(BaseModel):
    """The `trainer.correction` section of a recipe. rho is the probability of a token, trainer over sampler."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["auto"] | Method = Field(
        "auto",
        description="Weight or mask: token_tis, sequence_tis, icepop, kpop, sequence_mask, geometric_mask or none; "
        "auto is none where trainer and sampler agree in every bit, else token_tis with a veto below 1e-4.",
    )
    cap: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="TIS: largest weight; null is 2, as for all bounds the source's."
    )
    low: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="icepop, sequence_mask, geometric_mask: least rho that is kept."
    )
    high: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="icepop, sequence_mask, geometric_mask: largest rho that is kept."
    )
    max_binary_kl: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="kpop: largest divergence of a token, drawn or not, in nats."
    )
    veto: float | None = Field(
        None, gt=0, lt=1, description="A sequence with a token of rho below this is left out; null keeps them all."
    )
    off_policy_delta: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="A sequence with a negative advantage is left out when its tokens' mean of -log rho exceeds this.",
    )

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        given = [name for name in _BOUND_NAMES if getattr(self, name) is not None]
        known = BOUNDS.get(self.method, {})
        if stray := [name for name in given if name not in known]:
            owners = [method for method, bounds in BOUNDS.items() if stray[0] in bounds]
            raise ValueError(f"{stray[0]} is not a bound of method {self.method!r}, but of {', '.join(owners)}")
        low, high = (self.bound(name) if name in known else None for name in ("low", "high"))
        if low is not None and high is not None and not low < high:
            raise ValueError(f"low = {low} and high = {high} keep nothing; low must be the smaller one")
        return self

    @property
    def is_active(self) -> bool:
        assert self.method != "auto", "resolve the method first"
        return self.method != "none" or self.veto is not None or self.off_policy_delta is not None

    @property
    def weighs(self) -> bool:
        """Whether kept tokens get rho as a weight, not only 0 or 1."""
        return self.method in WEIGHTING

    def bound(self, name: str) -> float:
        given: float | None = getattr(self, name)
        return BOUNDS[self.method][name] if given is None else given

    def resolved(self, agrees: bool) -> "CorrectionConfig":
        """With its method and bounds written out. agrees: trainer and sampler do, in every bit."""
        changes: dict[str, float | str | None] = {}
        if self.method == "auto":
            changes = {"method": "none"} if agrees else {"method": "token_tis", "veto": self.veto or DEFAULT_VETO}
        chosen = self.model_copy(update=changes)
        return chosen.model_copy(update={name: chosen.bound(name) for name in BOUNDS[chosen.method]})


DEFAULT_VETO = 1e-4
NO_CORRECTION = CorrectionConfig(method="none")
