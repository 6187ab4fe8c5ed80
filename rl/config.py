"""The recipe: everything that decides a run, read from one YAML file and checked before anything starts."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from policy.lora_config import LoraConfig
from reward.config import RewardConfig
from rl.data_config import DataConfig
from rl.monitor_config import MonitorConfig, correcting
from rl.recipe_errors import describe_problems
from rl.recipe_yaml import apply_overrides, dump_mapping, parse_mapping
from rollout.config import RolloutConfig
from trainer.config import TrainerConfig

# Trainer fields that the supervised warm start does not read.
_REINFORCEMENT_ONLY = {
    "learning_rate",
    "warmup_steps",
    "clip_ratio_low",
    "clip_ratio_high",
    "old_log_probs",
    "correction",
}
# The keys of ops.FAST_FORMS; a recipe is read without torch, which ops would load.
FAST_OPERATORS = ("linear", "rms_norm", "softmax_attention", "lightning_attention")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicySource(_Section):
    """Where the policy comes from: a Hugging Face folder (`path`), or a new one (`config` and `vocab_size`)."""

    path: str | None = Field(None, min_length=1, description="Hugging Face folder of the policy to train.")
    config: dict[str, Any] = Field(
        default_factory=dict, description="Hugging Face config fields of the policy to build when there is no path."
    )
    vocab_size: int | None = Field(
        None, ge=64, description="Tokens in the tokenizer that is made for a new policy; null when path is given."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where trainer and engines compute; auto takes a GPU where there is one."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Type of matrix operands; auto asks the device."
    )
    chunk_size: int = Field(
        16, ge=16, description="Tokens in a chunk of linear attention, a power of two; part of the policy's numerics."
    )
    fp8_linear: bool | None = Field(
        None,
        description="Multiply in blockwise FP8 in attention projections, MLPs and experts, trainer and engines alike; "
        "null takes what the policy's config.json says, false where it says nothing. Needs dtype bfloat16.",
    )
    decay_layer_index: Literal["engine", "hf"] | None = Field(
        None,
        description="How lightning layers are counted for their decay (Ring-linear; `lockstep eval --compare-decay` "
        "tells which fits a policy); null takes what its config.json says, engine where it says nothing.",
    )

    @field_validator("chunk_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"must be a power of two, such as {1 << (value.bit_length() - 1)}, got {value}")
        return value


class WarmStartConfig(_Section):
    """Supervised steps that teach a new policy the form of the answers before the reinforcement learning."""

    steps: int = Field(ge=1, description="Optimizer steps.")
    tokens_per_step: int = Field(ge=1, description="Tokens of worked examples in a step, prompts included.")
    learning_rate: float = Field(gt=0, allow_inf_nan=False, description="AdamW's step size after the warmup.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises from 0.")
    slip_rate: float = Field(ge=0, le=1, description="Share of worked examples in which one step goes wrong.")


class EvaluationConfig(_Section):
    """How the policy is measured on the held-out problems."""

    samples: int = Field(8, ge=1, description="Completions sampled for each problem.")
    every: int = Field(0, ge=0, description="Steps between evaluations; 0 evaluates only before and after the run.")
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of probability that is sampled from; 1 is off.")
    max_new_tokens: int = Field(96, ge=1, description="Longest completion, in tokens; longer ones are truncated.")


class DynamicSamplingConfig(_Section):
    """Asking further prompts in place of those whose group teaches nothing, all its completions earning the same."""

    max_rounds: int = Field(
        1,
        ge=1,
        description="Rounds of loop.prompts_per_step prompts that a step samples at most, until as many groups have a "
        "signal; 1 trains on what the first round brings.",
    )


class LoopConfig(_Section):
    """The GRPO loop: how many steps, of what size, what is kept and when to stop."""

    steps: int = Field(ge=1, description="Steps of the run; each ends in one optimizer step.")
    prompts_per_step: int = Field(ge=1, description="Prompts in a step.")
    group_size: int = Field(ge=2, description="Completions sampled for each prompt; advantages compare them.")
    max_staleness: int = Field(
        0,
        ge=0,
        description="Most versions by which a sampling policy may lag. 0 is synchronous; with more, the batches of so "
        "many later steps are sampled while a step trains.",
    )
    checkpoint_every: int = Field(5, ge=1, description="Steps between checkpoints; the last step always writes one.")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints that are kept.")
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    on_mismatch: Literal["stop", "warn"] = Field(
        "stop", description="What to do when a trainer log-probability differs from the sampler's in any bit."
    )
    full_vocab_sequences: int = Field(
        2, ge=0, description="At most this many sequences of a step are compared over the whole vocabulary."
    )
    rescored_sequences: int = Field(
        8,
        ge=0,
        description="At most this many sequences of an asynchronous step are scored again under the weights that they "
        "were sampled from.",
    )
    rollouts_saved: int = Field(
        4, ge=0, description="At most this many groups of a step are written to the run folder."
    )


class OpsConfig(_Section):
    """How operators compute."""

    fast: tuple[str, ...] = Field(
        (),
        description=f"Operators that give up alignment for speed, of {', '.join(FAST_OPERATORS)}; "
        "needs loop.on_mismatch=warn.",
    )

    @field_validator("fast")
    @classmethod
    def _with_a_fast_form(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in FAST_OPERATORS:
                nearest = difflib.get_close_matches(name, FAST_OPERATORS, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"there is one of {', '.join(FAST_OPERATORS)}"
                raise ValueError(f"no fast form of {name!r}: {hint}")
        return names


class RayConfig(_Section):
    """Where the actors run."""

    address: str | None = Field(
        None, min_length=1, description="Address of a running Ray cluster; null starts one on this machine."
    )


class Recipe(_Section):
    """One run. With its seed, it decides the trained weights bit for bit."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its folder.")
    seed: int = Field(0, ge=0, lt=2**32, description="Decides initial weights, data order and every sampled token.")
    policy: PolicySource
    warm_start: WarmStartConfig | None = None
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    trainer: TrainerConfig = TrainerConfig()
    lora: LoraConfig | None = Field(None, description="Train adapters beside frozen weights; null trains every weight.")
    reward: RewardConfig = RewardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    loop: LoopConfig
    monitor: MonitorConfig = MonitorConfig()
    ops: OpsConfig = OpsConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        problems = _policy_problems(self) + _rollout_problems(self) + _reward_problems(self) + _alignment_problems(self)
        problems += _alarm_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, with each override `a.b=value` set on top (values are YAML).

    Raises one `ValueError` that lists everything wrong: missing file, YAML errors with their line, unknown keys
    with the nearest right name, values of a wrong type or range, sections that contradict each other.
    """
    mapping = apply_overrides(parse_mapping(_read(path), str(path)), overrides)
    try:
        # Strict JSON mode: "8" and true are no integers, but a list may fill a tuple and 1 a float.
        return Recipe.model_validate_json(json.dumps(mapping, default=str), strict=True)
    except ValidationError as error:
        problems = "\n".join(f"  {line}" for line in describe_problems(error, Recipe))
        raise ValueError(f"{path}: the recipe cannot be used\n{problems}") from error


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out, in the order of its sections; `load_recipe` reads it back."""
    return dump_mapping(recipe.model_dump(mode="json"))


def recipe_digest(mapping: Mapping[str, Any]) -> str:
    """SHA-256 in hex of the mapping's canonical JSON: neither key order nor layout counts."""
    canonical = json.dumps(mapping, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def warm_start_digest(recipe: Recipe) -> str:
    """Digest of what the warm-started policy depends on, and of nothing else, so that it can be reused."""
    assert recipe.warm_start is not None
    return recipe_digest(
        recipe.model_dump(
            mode="json",
            include={
                "seed": True,
                "policy": True,
                "warm_start": True,
                "data": {"difficulty", "families", "prompt_template"},
                "trainer": True,
                "ops": True,
            },
            exclude={"trainer": _REINFORCEMENT_ONLY},
        )
    )


def _policy_problems(recipe: Recipe) -> list[str]:
    return _new_policy_problems(recipe) if recipe.policy.path is None else _given_policy_problems(recipe)


def _new_policy_problems(recipe: Recipe) -> list[str]:
    problems = []
    if not recipe.policy.config:
        problems.append("policy.config: required to build a new policy; give it, or name a folder in policy.path")
    if recipe.policy.vocab_size is None:
        problems.append("policy.vocab_size: required to build a new policy; give it, or name a folder in policy.path")
    if "vocab_size" in recipe.policy.config:
        problems.append("policy.config.vocab_size: belongs to the tokenizer; set policy.vocab_size instead")
    if recipe.warm_start is None:
        problems.append("warm_start: a new policy must be warm-started; give the section, or set policy.path")
    return problems


def _given_policy_problems(recipe: Recipe) -> list[str]:
    unused = {
        "policy.config": bool(recipe.policy.config),
        "policy.vocab_size": recipe.policy.vocab_size is not None,
        "warm_start": recipe.warm_start is not None,
    }
    return [
        f"{key}: only for a new policy, but policy.path is {recipe.policy.path!r}; remove one of the two"
        for key, given in unused.items()
        if given
    ]


def _rollout_problems(recipe: Recipe) -> list[str]:
    rollout, problems = recipe.rollout, []
    if rollout.top_p != 1 or rollout.top_k != 0:
        problems.append(
            f"rollout.top_p, rollout.top_k: training samples from the whole vocabulary, so they must be 1 and 0, "
            f"got {rollout.top_p} and {rollout.top_k}"
        )
    if rollout.prefill_tokens < recipe.policy.chunk_size:
        problems.append(
            f"rollout.prefill_tokens: must hold at least one chunk (policy.chunk_size = {recipe.policy.chunk_size}), "
            f"got {rollout.prefill_tokens}"
        )
    for key, new_tokens in (
        ("rollout.max_new_tokens", rollout.max_new_tokens),
        ("evaluation.max_new_tokens", recipe.evaluation.max_new_tokens),
    ):
        problems += _length_problems(recipe, key, new_tokens)
    return problems


def _reward_problems(recipe: Recipe) -> list[str]:
    overlong, longest = recipe.reward.components.overlong, recipe.rollout.max_new_tokens
    if overlong is None or overlong.max_tokens - overlong.buffer_tokens < longest:
        return []
    return [
        f"reward.components.overlong: nothing is punished up to {overlong.max_tokens - overlong.buffer_tokens} tokens "
        f"(max_tokens - buffer_tokens), and rollout.max_new_tokens = {longest} allows no more; lower max_tokens"
    ]


def _alignment_problems(recipe: Recipe) -> list[str]:
    if recipe.loop.on_mismatch != "stop":
        return []
    rule = "gives the trainer other log-probabilities than the sampler's, at which loop.on_mismatch = stop ends the run"
    fast, engine = ", ".join(recipe.ops.fast), recipe.rollout.engine
    problems = [f"ops.fast: {fast} in fast form {rule}; set loop.on_mismatch=warn"] if fast else []
    foreign = [] if recipe.rollout.is_aligned else [f"rollout.engine: {engine} {rule}; set loop.on_mismatch=warn"]
    return problems + foreign


def _alarm_problems(recipe: Recipe) -> list[str]:
    correction, asked = recipe.trainer.correction.method, ", ".join(correcting(recipe.monitor))
    if not asked:
        return []
    rule = f"monitor.alarms: {asked} would switch trainer.correction on, but"
    problems = []
    if correction not in ("auto", "none"):
        problems.append(f"{rule} it is on from the start ({correction}); set another action or method=auto")
    if recipe.trainer.old_log_probs == "rollout":
        problems.append(f"{rule} it needs the trainer's own old log-probs; set trainer.old_log_probs=auto")
    return problems


def _length_problems(recipe: Recipe, key: str, new_tokens: int) -> list[str]:
    positions = recipe.policy.config.get("max_position_embeddings")
    longest = recipe.data.max_prompt_tokens + new_tokens
    if not isinstance(positions, int) or longest <= positions:
        return []
    return [
        f"{key}: with data.max_prompt_tokens = {recipe.data.max_prompt_tokens} a sequence can reach {longest} tokens, "
        f"more than policy.config.max_position_embeddings = {positions}; lower one or raise the other"
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        names = sorted(each.name for each in path.parent.glob("*.yaml"))
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(str(path.parent / name) for name in near)}?" if near else ""
        raise ValueError(f"recipe {path}: no such file{hint}") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: not a YAML text file: {error}") from error
