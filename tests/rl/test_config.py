"""Recipes: what is read, what is refused and in which words, and what the digests cover."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rl.config import Recipe, load_recipe, recipe_digest, resolved_yaml, warm_start_digest
from rl.recipe_yaml import apply_overrides, dump_mapping, parse_mapping

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def quickstart(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, overrides)


def refusal(*overrides: str, path: Path = QUICKSTART) -> str:
    with pytest.raises(ValueError) as error:
        load_recipe(path, overrides)
    return str(error.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_quickstart_has_the_values_of_its_file_and_the_defaults() -> None:
    recipe = quickstart()
    assert recipe.policy.config["hidden_size"] == 128
    assert (recipe.loop.steps, recipe.loop.prompts_per_step, recipe.loop.group_size) == (40, 64, 8)
    assert recipe.rollout.workers == 2
    assert recipe.trainer.betas == (0.9, 0.95)
    assert recipe.loop.on_mismatch == "stop"
    assert recipe.ray.address is None


@pytest.mark.parametrize("text", ["3e-5", "3.0e-5", "3E-05", "+3e-5", "0.00003"])
def test_override_reads_every_spelling_of_a_float(text: str) -> None:
    assert quickstart(f"trainer.learning_rate={text}").trainer.learning_rate == 3e-5


def test_overrides_reach_sections_defaults_lists_and_free_fields() -> None:
    recipe = quickstart(
        "loop.steps=3",
        "trainer.betas=[0.8, 0.9]",
        "ray.address=local",
        "policy.config.num_experts=4",
        "trainer.clip_grad_norm=1",
    )
    assert recipe.loop.steps == 3
    assert recipe.trainer.betas == (0.8, 0.9)
    assert recipe.ray.address == "local"
    assert recipe.policy.config["num_experts"] == 4
    assert recipe.policy.config["hidden_size"] == 128
    assert recipe.trainer.clip_grad_norm == 1.0


def test_overrides_leave_the_given_mapping_alone() -> None:
    mapping = {"loop": {"steps": 1}}
    assert apply_overrides(mapping, ["loop.steps=2", "warm_start.steps=5"]) == {
        "loop": {"steps": 2},
        "warm_start": {"steps": 5},
    }
    assert mapping == {"loop": {"steps": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.worker=1", "unknown key 'rollout.worker': did you mean 'rollout.workers'?"),
        ("lop.steps=1", "unknown key 'lop': did you mean 'loop'?"),
        ("group_size=4", "unknown key 'group_size': did you mean 'loop.group_size'?"),
        ("ray.zzz=4", "unknown key 'ray.zzz': the keys here are ray.address"),
        ("warm_start.step=4", "unknown key 'warm_start.step': did you mean 'warm_start.steps'?"),
        ("rollout.workers=0", "rollout.workers: should be greater than or equal to 1, got 0"),
        ("rollout.workers=two", "rollout.workers: should be a valid integer, got 'two'"),
        ("rollout.workers='2'", "rollout.workers: should be a valid integer, got '2'"),
        ("rollout.workers=true", "rollout.workers: should be a valid integer, got True"),
        ("loop.group_size=1", "loop.group_size: should be greater than or equal to 2, got 1"),
        ("loop.on_mismatch=go", "loop.on_mismatch: should be 'stop' or 'warn', got 'go'"),
        (
            "rollout.engine=vllm",
            "rollout.engine: vllm gives the trainer other log-probabilities than the sampler's, at which "
            "loop.on_mismatch = stop ends the run; set loop.on_mismatch=warn",
        ),
        ("policy.chunk_size=48", "policy.chunk_size: must be a power of two, such as 32, got 48"),
        ("policy.chunk_size=8", "policy.chunk_size: should be greater than or equal to 16, got 8"),
        ("trainer.betas=[0.9, 1.0]", "trainer.betas.1: should be less than 1, got 1.0"),
        ("trainer.learning_rate=.nan", "trainer.learning_rate: should be a finite number, got nan"),
        ("rollout.temperature=.inf", "rollout.temperature: should be a finite number, got inf"),
        ("rollout=null", "rollout: should be a section of keys, got None"),
        ("trainer.betas=3", "trainer.betas: should be a list, got 3"),
        ("policy.config=3", "policy.config: should be a mapping, got 3"),
        ("data.difficulty=4", "data.difficulty: should be less than or equal to 3, got 4"),
        ("seed=4294967296", "seed: should be less than 4294967296, got 4294967296"),
        ("name=a/b", "name: String should match pattern"),
        ("warm_start=null", "warm_start: a new policy must be warm-started"),
        ("policy.config={}", "policy.config: required to build a new policy"),
        ("policy.vocab_size=null", "policy.vocab_size: required to build a new policy"),
        ("policy.config.vocab_size=99", "policy.config.vocab_size: belongs to the tokenizer"),
        ("policy.path=here", "warm_start: only for a new policy, but policy.path is 'here'"),
        ("rollout.top_p=0.9", "training samples from the whole vocabulary, so they must be 1 and 0, got 0.9 and 0"),
        ("rollout.top_k=5", "they must be 1 and 0, got 1.0 and 5"),
        ("policy.chunk_size=4096", "rollout.prefill_tokens: must hold at least one chunk (policy.chunk_size = 4096)"),
        (
            "reward.components.overlog={}",
            "unknown key 'reward.components.overlog': did you mean 'reward.components.over",
        ),
        (
            "reward.components.overlong.max_tokens=9",
            "reward.components.overlong.buffer_tokens: required, but not given",
        ),
        (
            "reward.components.overlong={max_tokens: 200, buffer_tokens: 50}",
            "reward.components.overlong: nothing is punished up to 150 tokens (max_tokens - buffer_tokens), and "
            "rollout.max_new_tokens = 96 allows no more; lower max_tokens",
        ),
        (
            "reward.components.format.answer=false",
            "reward.components.format: answer, thinking and pattern ask for nothing",
        ),
        ("reward.components.function.path=mine", "reward.components.function.path: must be FILE.py:NAME, such as "),
        ("rollout.max_new_tokens=2048", "rollout.max_new_tokens: with data.max_prompt_tokens = "),
        ("evaluation.max_new_tokens=2048", "evaluation.max_new_tokens: with data.max_prompt_tokens = "),
    ],
)
def test_refusal_names_the_key_the_value_and_the_rule(override: str, message: str) -> None:
    lines = refusal(override).splitlines()
    assert lines[0] == f"{QUICKSTART}: the recipe cannot be used"
    assert any(message in line for line in lines[1:]), lines


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loop.steps"], "override 'loop.steps': expected key=value"),
        (["=1"], "override '=1': expected key=value"),
        (["loop..steps=1"], "override 'loop..steps=1': expected key=value"),
        (["seed.low=1"], "override seed.low: seed is 0, not a section"),
        (["seed=1", "seed=2"], "override 'seed=2': seed is overridden twice"),
        (["trainer.betas=[1"], "override 'trainer.betas=[1':1:3: "),
    ],
)
def test_malformed_override_is_refused(overrides: list[str], message: str) -> None:
    assert refusal(*overrides).startswith(message)


def test_every_problem_is_listed_at_once() -> None:
    lines = refusal("rollout.workers=0", "trainer.lerning_rate=1", "loop.steps=x", "seed=-1").splitlines()
    assert lines[1:] == [
        "  seed: should be greater than or equal to 0, got -1",
        "  rollout.workers: should be greater than or equal to 1, got 0",
        "  unknown key 'trainer.lerning_rate': did you mean 'trainer.learning_rate'?",
        "  loop.steps: should be a valid integer, got 'x'",
    ]


def test_contradictions_between_sections_are_listed_at_once() -> None:
    lines = refusal("policy.path=here", "rollout.top_k=3").splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "policy.config",
        "policy.vocab_size",
        "warm_start",
        "rollout.top_p, rollout.top_k",
    ]


def test_policy_from_a_folder_needs_no_warm_start() -> None:
    recipe = quickstart("policy={path: some/folder}", "warm_start=null")
    assert recipe.policy.path == "some/folder"
    assert recipe.warm_start is None


def test_missing_section_is_named(tmp_path: Path) -> None:
    lines = refusal(path=written(tmp_path, "name: x\n")).splitlines()
    assert "  loop: required, but not given" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nseed: 1\nseed: 2\n", "recipe.yaml:3:1: key 'seed' is given twice; keep one"),
        ("loop:\n  steps: 1\n  steps: 1\n", "recipe.yaml:3:3: key 'steps' is given twice; keep one"),
        ("name: x\nloop: [1\n", "recipe.yaml:3:1: "),
        ("name: !!python/object:os.system x\n", "recipe.yaml:1:7: "),
        ("", "recipe.yaml: expected a mapping of keys to values, found nothing"),
        ("- 1\n", "recipe.yaml: expected a mapping of keys to values, found a list"),
        ("name: \x00\n", "recipe.yaml: not YAML: "),
    ],
)
def test_yaml_error_gives_its_place(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(path=written(tmp_path, text)).startswith(f"{tmp_path}/{message}")


def test_missing_file_suggests_its_neighbour() -> None:
    message = refusal(path=QUICKSTART.with_name("quikstart.yml"))
    assert message.endswith(f"quikstart.yml: no such file; did you mean {QUICKSTART}?")


def test_folder_and_binary_file_are_refused(tmp_path: Path) -> None:
    assert "not a YAML text file" in refusal(path=tmp_path)
    binary = tmp_path / "recipe.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not a YAML text file" in refusal(path=binary)


def test_resolved_recipe_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = quickstart("trainer.learning_rate=3e-5", "name=1e5x", "policy.config.note='3e-5'")
    text = resolved_yaml(recipe)
    again = load_recipe(written(tmp_path, text))
    assert again == recipe
    assert resolved_yaml(again) == text
    assert list(yaml.safe_load(text)) == list(Recipe.model_fields)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.dictionaries(st.text(), scalars | st.lists(scalars) | st.dictionaries(st.text(), scalars)))
def test_dumped_mapping_reads_back_equal(mapping: dict[str, object]) -> None:
    again = parse_mapping(dump_mapping(mapping), "dumped")
    assert again == mapping
    assert list(again) == list(mapping)


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_float_survives_an_override(value: float) -> None:
    (read,) = apply_overrides({}, [f"x={value!r}"]).values()
    assert isinstance(read, float)
    assert math.copysign(1, read) == 1 and read == value


def test_digest_ignores_key_order_and_nothing_else() -> None:
    # printf '{"a":1,"b":[2]}' | sha256sum
    expected = "0855bfc20eb6cfaa4be7d6b510c63dd22997718bddadcb1a4915cec3a16145b9"
    assert recipe_digest({"b": [2], "a": 1}) == recipe_digest({"a": 1, "b": [2]}) == expected
    assert recipe_digest({"a": 1, "b": [3]}) != expected


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "policy.chunk_size=32",
        "policy.config.hidden_size=256",
        "warm_start.slip_rate=0.25",
        "data.difficulty=2",
        "data.families=[remainder]",
        "trainer.threads=1",
        "trainer.clip_grad_norm=2",
    ],
)
def test_warm_start_digest_follows_what_the_base_policy_depends_on(override: str) -> None:
    assert warm_start_digest(quickstart(override)) != warm_start_digest(quickstart())


@pytest.mark.parametrize(
    "override",
    ["name=other", "loop.steps=9", "rollout.workers=4", "trainer.learning_rate=1e-5", "data.eval_size=7"],
)
def test_warm_start_digest_ignores_the_rest(override: str) -> None:
    assert warm_start_digest(quickstart(override)) == warm_start_digest(quickstart())
