"""One step of a tiny run with a fault planted in its engine or its trainer, saved as the loop saves a mismatch.

The same actors and the same system as in a run, as plain objects in this process; a fault is in place only while the
side that has it computes.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console

import ops
from policy.checkpoint import DTYPES, save_policy
from policy.config import PolicyConfig
from policy.tokenizer import load_tokenizer, train_tokenizer
from policy.transformer import Policy
from reward.result import Reason
from rl.actors import TrainerActor
from rl.config import Recipe
from rl.data_columns import Row
from rl.diagnose.capture import capture_mismatch
from rl.prompts import Prompt, encode_prompts
from rl.rollouts import Scored
from rl.run_folder import RunFolder
from rl.step_sampling import step_requests
from rollout.engine import Engine
from rollout.request import Request
from tests.rl.tiny import LocalSystem, make_reward, tiny_recipe

CONFIG = PolicyConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=4, layer_group_size=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=64, moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
    initializer_range=0.15, chunk_size=16,
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROBLEMS = ("What is the remainder of 17 * 3 + 5 divided by 4?", "Add 25 to 36, take away 12, and say what is left.")
Patch = Callable[[], AbstractContextManager[Any]]


class FaultyActor:
    """A call runs at once, with the faults of its side in place."""

    def __init__(self, target: Any, patches: list[Patch]) -> None:
        self.target, self._patches = target, patches

    def __getattr__(self, verb: str) -> SimpleNamespace:
        def remote(*arguments: Any) -> Any:
            with ExitStack() as stack:
                for patch in self._patches:
                    stack.enter_context(patch())
                return getattr(self.target, verb)(*arguments)

        return SimpleNamespace(remote=remote)


class Rig(LocalSystem):
    """engine_patches, trainer_patches: put in place around every call of that side. alter: what the engine makes of a
    request before it answers it."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, Console(quiet=True))
        self.engine_patches: list[Patch] = []
        self.trainer_patches: list[Patch] = []
        self.alter: Callable[[Request], Request] = lambda request: request

    def _start_on_device(self, kind: type, threads: int, *arguments: Any) -> Any:
        patches = self.trainer_patches if kind is TrainerActor else self.engine_patches
        return FaultyActor(kind(*arguments, "cpu", self.recipe.ops.fast), patches)

    @property
    def base(self) -> Path:
        return Path(str(self.recipe.policy.path))

    @property
    def engine(self) -> Engine:
        engine: Engine = self.engines[0].target.engine
        return engine


def save_base(folder: Path, equal_experts: bool = False) -> Path:
    """A random policy with a tokenizer. equal_experts: the router gives two experts the same score, always."""
    policy = Policy(CONFIG, torch.float32)
    policy.initialize(seed=3)
    if equal_experts:
        for name, parameter in policy.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.data[1] = parameter.data[2]
    tokenizer = train_tokenizer([*PROBLEMS, TEMPLATE], CONFIG.vocab_size)
    tokenizer.chat_template = TEMPLATE
    save_policy(folder, policy)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_for(base: Path, folder: Path, *overrides: str) -> Recipe:
    given = (f"policy.path={base}", "policy.config={}", "policy.vocab_size=null", "warm_start=null")
    return tiny_recipe(folder, *given, "rollout.max_new_tokens=24", "loop.group_size=2", *overrides)


@contextmanager
def opened(folder: Path, *overrides: str, equal_experts: bool = False) -> Iterator[Rig]:
    """A system whose trainer and engine hold version 0 of a policy; plant a fault, then `save`."""
    base = save_base(folder / "run" / "base", equal_experts)
    rig = Rig(recipe_for(base, folder, *overrides))
    rig.trainer = rig._start_on_device(TrainerActor, 1, 1)
    try:
        config = rig.start_training(base)
        rig.start_engines(config, base, DTYPES[rig.recipe.policy.dtype])
        rig.sync_weights()
        yield rig
    finally:
        torch.use_deterministic_algorithms(False)
        ops.use_fast([])


def prompts_of(rig: Rig) -> list[Prompt]:
    rows = [Row(f"row-{n}", problem, "7", "given") for n, problem in enumerate(PROBLEMS)]
    return encode_prompts(rows, rig.recipe.data, load_tokenizer(rig.base))


def sample_step(rig: Rig, step: int) -> list[Scored]:
    prompts = prompts_of(rig)
    requests = [rig.alter(each) for each in step_requests(rig.recipe, step, prompts, len(prompts), Counter())]
    return [
        Scored(prompts[each.request_id], each, "", make_reward(Reason.OK), 1.0 if each.sample % 2 else -1.0)
        for each in rig.generate(requests)
    ]


def run_step(rig: Rig, step: int) -> tuple[list[Scored], list[np.ndarray]]:
    """Samples and computes gradients; the completions, and the trainer's log-probs of each."""
    scored = sample_step(rig, step)
    return scored, rig.compute([each.to_sample() for each in scored]).log_probs


def save(rig: Rig, folder: Path) -> Path:
    """The next step, saved as a mismatch whether it is one or not."""
    step = rig.trainer.target.trainer.policy_version + 1
    saved = capture_mismatch(rig, RunFolder(folder / "run"), rig.recipe, step, *run_step(rig, step))
    assert saved is not None
    return saved


def with_temperature(request: Request, temperature: float) -> Request:
    return replace(request, sampling=replace(request.sampling, temperature=temperature))


def with_prompt(request: Request, ids: list[int]) -> Request:
    return replace(request, prompt_ids=np.array(ids, dtype=np.int64))
