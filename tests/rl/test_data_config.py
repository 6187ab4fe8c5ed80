"""The data section of a recipe: what it takes, refuses and writes back."""

from pathlib import Path

import pydantic
import pytest

from rl.config import load_recipe, resolved_yaml
from rl.data_config import DataConfig, DataSource, FilterConfig
from tests.rl.tiny import write_recipe


def test_config_refuses_bad_values() -> None:
    for fields, message in [
        ({"prompt_template": "Solve."}, r"prompt_template = 'Solve\.': must contain \{problem\} exactly once"),
        ({"families": ["geometry"]}, r"families = \['geometry'\]: give one or more of remainder"),
        ({"difficulty": 4}, "less than or equal to 3"),
        ({"trian": "synthetic"}, "Extra inputs"),
    ]:
        with pytest.raises(pydantic.ValidationError, match=message):
            DataConfig.model_validate(fields)


def test_every_config_field_is_described() -> None:
    for section in (DataConfig, DataSource, FilterConfig):
        described = [name for name, field in section.model_fields.items() if field.description]
        assert described == [name for name in section.model_fields if name != "filters"]


def test_prompt_keeps_other_braces() -> None:
    config = DataConfig(prompt_template="{problem} Answer in \\boxed{}.")
    assert config.prompt("Is {problem} a set?") == "Is {problem} a set? Answer in \\boxed{}."


def test_one_name_is_one_source_and_is_written_back_as_a_name() -> None:
    config = DataConfig(train="gsm8k")
    assert config.train == (DataSource(source="gsm8k", weight=1.0),)
    assert config.model_dump()["train"] == "gsm8k"


def test_a_recipe_with_several_sources_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["data.train=[{source: a.jsonl, weight: 2}, gsm8k]"])
    assert recipe.data.train == (DataSource(source="a.jsonl", weight=2.0), DataSource(source="gsm8k", weight=1.0))
    (tmp_path / "again.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=[]", "data.train: names no source; name one, such as synthetic or a file"),
        ("data.train=[a, a]", "data.train: a is listed twice; give it once, with the sum of the weights"),
        ("data.train=7", "data.train: should be a list, got 7"),
        (
            "data.train=[{source: a, wieght: 2}]",
            "unknown key 'data.train.0.wieght': did you mean 'data.train.0.weight'?",
        ),
        ("data.train=[{source: a, weight: 0}]", "data.train.0.weight: should be greater than or equal to 0.001, got 0"),
        ("data.filters.pass_rate=[0.9, 0.1]", "must be [least, greatest] with 0 <= least <= greatest, got [0.9, 0.1]"),
        ("data.filters.answer_types=[]", "data.filters.answer_types: names no type, which lets no problem through"),
        ("data.filters.answer_types=[int]", "data.filters.answer_types.0: should be 'integer', 'integer_0_999', "),
        ("data.contamination=delete", "data.contamination: should be 'refuse', 'drop', 'warn' or 'off', got 'delete'"),
    ],
)
def test_mistakes_are_one_line_each(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe(write_recipe(tmp_path), [override])
    _, *lines = str(error.value).splitlines()
    assert len(lines) == 1 and message in lines[0]
