"""The `data` section of a recipe: where problems come from and how a problem becomes a prompt."""

from pydantic import BaseModel, Field, field_validator

from rl.problems import FAMILIES, check_families

SYNTHETIC = "synthetic"
PLACEHOLDER = "{problem}"


class DataConfig(BaseModel, extra="forbid", frozen=True):
    """Sources of the training and evaluation problems. `load_problems` in `rl.data` reads them."""

    train: str = Field(
        SYNTHETIC,
        min_length=1,
        description="Training problems: 'synthetic', a .jsonl, .json or .parquet file, or a Hugging Face dataset name "
        "('name:split' for another split than 'train').",
    )
    eval: str = Field(SYNTHETIC, min_length=1, description="Evaluation problems; the same choices as for train.")
    train_size: int = Field(1000, ge=1, description="Synthetic training problems; a file or dataset is used whole.")
    eval_size: int = Field(
        200, ge=1, description="Evaluation problems: so many synthetic ones, or the first so many of a file or dataset."
    )
    difficulty: int = Field(1, ge=1, le=3, description="Synthetic problems: 1 easy, 2 larger numbers, 3 more steps.")
    families: tuple[str, ...] = Field(
        FAMILIES, description=f"Synthetic problems: families in equal shares, of {', '.join(FAMILIES)}."
    )
    max_prompt_tokens: int = Field(
        128, ge=1, description="Longest prompt allowed, in tokens; a longer one is refused, never cut."
    )
    prompt_template: str = Field(
        "{problem}\n", description="Prompt text; {problem} stands for the problem, other braces for themselves."
    )

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

    def prompt(self, problem: str) -> str:
        """The prompt text of a problem."""
        return self.prompt_template.replace(PLACEHOLDER, problem)
