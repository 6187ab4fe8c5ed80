"""The reward section of a recipe: what a completion earns, where its answer stands, what a verification may cost."""

import re
from typing import Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator


class _Section(BaseModel, extra="forbid", frozen=True):
    pass


class _Component(_Section):
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="Factor of this component's value in the total.")


class CorrectnessConfig(_Section):
    """The verdict on the answer: 1 for a correct one, 0 for any other."""

    weight: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="Factor of the verdict in the total; with 0 it is measured and earns nothing.",
    )


class FormatConfig(_Component):
    """1 for a completion that has every part asked for, else 0."""

    answer: bool = Field(True, description="An answer stands where reward.answer_marker says; after the thinking.")
    thinking: bool = Field(
        False,
        description="Thinking is closed: in prompt and completion every <think> has its </think>, and the completion "
        "closes one.",
    )
    pattern: str | None = Field(
        None, min_length=1, description="Python regular expression that must match somewhere in the completion."
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"must be a Python regular expression, got {pattern!r}: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if not (self.answer or self.thinking or self.pattern):
            raise ValueError("answer, thinking and pattern ask for nothing; set one of them, or leave the section out")
        return self


class OverlongConfig(_Component):
    """DAPO's soft overlong punishment, from 0 down to -1 as a completion nears its greatest length."""

    max_tokens: int = Field(ge=1, description="Tokens of a completion, its end token counted, from which it is -1.")
    buffer_tokens: int = Field(ge=1, description="Tokens before max_tokens over which it falls from 0 to -1.")

    @model_validator(mode="after")
    def _buffer_fits(self) -> Self:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(f"buffer_tokens = {self.buffer_tokens} exceeds max_tokens = {self.max_tokens}; lower it")
        return self


class LanguageConfig(_Component):
    """The share of a completion's letters that are of the asked script, LaTeX commands left out."""

    script: Literal["latin", "cjk", "cyrillic", "greek", "arabic", "hebrew", "devanagari"] = Field(
        "latin", description="Script of the language asked for; cjk is Chinese, Japanese and Korean."
    )


class RepetitionConfig(_Component):
    """Minus the share of a completion's word n-grams that occurred before in it: from 0 down towards -1."""

    ngram: int = Field(20, ge=1, description="Words of an n-gram; a Chinese or Japanese character is a word.")


class FunctionConfig(_Component):
    """A Python function of the user's own, run in a process of its own under the limits of a verification."""

    path: str = Field(
        description="FILE.py:NAME, the file relative to where the run is started. Called with completion, prompt, "
        "answer, num_tokens, truncated and the row's other columns by keyword; must accept **kwargs and return a "
        "number that follows from its arguments alone."
    )
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the file, which a run refuses to go on without; null takes the file as it is found.",
    )

    @field_validator("path")
    @classmethod
    def _names_file_and_function(cls, path: str) -> str:
        if not re.fullmatch(r".+\.py:[^\W\d]\w*", path):
            raise ValueError(f"must be FILE.py:NAME, such as my_rewards.py:score, got {path!r}")
        return path


class ComponentsConfig(_Section):
    """What the reward is the weighted sum of. A component that is not named does not count."""

    correctness: CorrectnessConfig = CorrectnessConfig()
    format: FormatConfig | None = None
    overlong: OverlongConfig | None = None
    language: LanguageConfig | None = None
    repetition: RepetitionConfig | None = None
    function: FunctionConfig | None = None

    @model_validator(mode="after")
    def _earns_something(self) -> Self:
        if not any(self.weights().values()):
            raise ValueError("correctness.weight is 0 and nothing else counts; raise it, or name another component")
        return self

    def weights(self) -> dict[str, float]:
        """The weight of every component that is named, in the order in which they are added up."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: section.weight for name, section in sections.items() if section is not None}


class RewardConfig(_Section):
    """Settings of `reward.pool.RewardPool` and `reward.composite.CompositeReward`."""

    answer_marker: str = Field(
        default="\\boxed",
        min_length=1,
        description="What announces the answer. `\\boxed` takes the content of the last \\boxed{...}; any other text, "
        "such as `####` or `Answer:`, takes what follows its last occurrence on the same line.",
    )
    components: ComponentsConfig = ComponentsConfig()
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
    max_failure_fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Largest share of completions whose reward may fail (bad gold, timeout, dead worker, error of the "
        "user's function) over failure_window steps; beyond it the run stops. 1 never stops it.",
    )
    failure_window: int = Field(
        default=8,
        ge=1,
        description="Steps over which failures are counted; steps not yet taken count as free of them.",
    )
