"""The `data` section of a recipe: where problems come from, which of them are used, and how one becomes a prompt."""

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, field_serializer, field_validator, model_validator

from rl.problems import FAMILIES, check_families

SYNTHETIC = "synthetic"
PLACEHOLDER = "{problem}"
PROMPT_FIELDS = ("prompt_template", "chat", "system", "thinking")
"""What of DataConfig makes a prompt of a problem; an exported policy keeps it."""

AnswerType = Literal["integer", "integer_0_999", "decimal", "fraction", "choice", "expression"]


class DataSource(BaseModel, extra="forbid", frozen=True):
    """One of several sources of training problems."""

    source: str = Field(min_length=1, description="A source, as data.train names one.")
    weight: float = Field(
        1.0, ge=0.001, le=1000, description="Share of the prompts, against the other weights; counted in thousandths."
    )


class FilterConfig(BaseModel, extra="forbid", frozen=True):
    """Which training problems are used. What is left out is counted and printed; evaluation problems stay whole."""

    problem_chars: tuple[int, int] | None = Field(None, description="Shortest and longest problem, in characters.")
    prompt_tokens: tuple[int, int] | None = Field(
        None, description="Shortest and longest prompt, in tokens of the policy's tokenizer."
    )
    answer_types: tuple[AnswerType, ...] | None = Field(
        None,
        description="Kinds of answer: integer, integer_0_999 (AIME's), decimal, fraction (a/b), choice (A to J), "
        "expression (all others).",
    )
    pass_rate: tuple[float, float] | None = Field(
        None, description="Least and greatest pass rate, as `lockstep data pass-rates` measured it."
    )

    @field_validator("answer_types")
    @classmethod
    def _some_type(cls, types: tuple[AnswerType, ...] | None) -> tuple[AnswerType, ...] | None:
        if types == ():
            raise ValueError("names no type, which lets no problem through; name one, or leave it out")
        return types

    @field_validator("problem_chars", "prompt_tokens", "pass_rate")
    @classmethod
    def _least_first(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds and not 0 <= bounds[0] <= bounds[1]:
            raise ValueError(f"must be [least, greatest] with 0 <= least <= greatest, got {list(bounds)}")
        return bounds


class DataConfig(BaseModel, extra="forbid", frozen=True):
    """Sources of the training and evaluation problems. `load_problems` in `rl.data` reads them."""

    train: tuple[DataSource, ...] = Field(
        (DataSource(source=SYNTHETIC),),
        description="Training problems: 'synthetic', a .jsonl, .json or .parquet file, a known dataset ('gsm8k'; "
        "'gsm8k@FOLDER' for a copy of it), a Hugging Face dataset name ('name:split' for another split than 'train'); "
        "or a list of {source, weight}.",
    )
    eval: str = Field(SYNTHETIC, min_length=1, description="Evaluation problems: one source, named as for train.")
    train_size: int = Field(1000, ge=1, description="Synthetic training problems; a file or dataset is used whole.")
    eval_size: int = Field(
        200, ge=1, description="Evaluation problems: so many synthetic ones, or the first so many of a file or dataset."
    )
    difficulty: int = Field(1, ge=1, le=3, description="Synthetic problems: 1 easy, 2 larger numbers, 3 more steps.")
    families: tuple[str, ...] = Field(
        FAMILIES, description=f"Synthetic problems: families in equal shares, of {', '.join(FAMILIES)}."
    )
    deduplicate: Literal["off", "exact", "near"] = Field(
        "off",
        description="Leave out training problems that repeat an earlier one: in the same words, however typeset "
        "(exact), or also in nearly the same words, with the same numbers and answer (near).",
    )
    filters: FilterConfig = FilterConfig()
    contamination: Literal["refuse", "drop", "warn", "off"] = Field(
        "warn", description="What to do when a training problem is found among the evaluation problems."
    )
    curriculum_stages: int = Field(
        1,
        ge=1,
        description="Equal parts of the run and of the problems sorted by pass rate: the first part asks the easiest "
        "problems, the last the hardest; 1 mixes all.",
    )
    max_prompt_tokens: int = Field(
        128, ge=1, description="Longest prompt allowed, in tokens; a longer one is refused, never cut."
    )
    prompt_template: str = Field(
        "{problem}\n",
        description="Prompt text; {problem} stands for the problem, other braces for themselves. In a chat this is "
        "what the user says, without the white space around it.",
    )
    chat: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether prompts go through the tokenizer's chat template; auto: where it has one. A prompt that "
        "is a list of messages is then taken as it is.",
    )
    system: str | None = Field(
        None, min_length=1, description="What the system says in a chat whose messages do not start with its own words."
    )
    thinking: bool | None = Field(
        None, description="The chat template's enable_thinking; null leaves it to the template."
    )

    @field_validator("train", mode="before")
    @classmethod
    def _names_are_sources(cls, train: Any) -> Any:
        sources = [train] if isinstance(train, str) else train
        if not isinstance(sources, list | tuple):
            return train
        return tuple({"source": each} if isinstance(each, str) else each for each in sources)

    @field_validator("train")
    @classmethod
    def _each_source_once(cls, train: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        if not train:
            raise ValueError("names no source; name one, such as synthetic or a file")
        names = [each.source for each in train]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is listed twice; give it once, with the sum of the weights")
        return train

    @field_serializer("train")
    def _as_written(self, train: tuple[DataSource, ...]) -> str | list[dict[str, Any]]:
        """One source alone is written as its name."""
        return train[0].source if len(train) == 1 else [each.model_dump() for each in train]

    @field_validator("families")
    @classmethod
    def _known_families(cls, families: tuple[str, ...]) -> tuple[str, ...]:
        check_families(families)
        return families

    @field_validator("prompt_template")
    @classmethod
    def _one_placeholder(cls, template: str) -> str:
        if template.count(PLACEHOLDER) != 1:
            raise ValueError(f"prompt_template = {template!r}: must contain {PLACEHOLDER} exactly once")
        return template

    @model_validator(mode="after")
    def _settings_of_a_chat(self) -> Self:
        for name in ("system", "thinking"):
            if self.chat == "off" and getattr(self, name) is not None:
                raise ValueError(f"{name}: belongs to a chat, but chat is off; remove one of the two")
        return self

    def prompt(self, problem: str) -> str:
        """The prompt text of a problem."""
        return self.prompt_template.replace(PLACEHOLDER, problem)
