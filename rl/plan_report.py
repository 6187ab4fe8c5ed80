"""`lockstep plan` in words: the needs of a run beside what its GPUs have, and what to change."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Group
from rich.table import Table
from rich.text import Text

from policy.config import PolicyConfig
from policy.lora import adaptable_modules
from policy.lora_config import LoraConfig
from rl.base_policy import planned_config
from rl.config import Recipe
from rl.plan import USABLE, Needs, count_needs, longest_sequence

UNITS = {"GB": 10**9, "GIB": 2**30}
MOST_GPUS = 1024
ADVISED_RANK = 16
ADVISED_TARGETS = ("query_key_value", "dense", "q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Machine:
    """gpus of `memory` bytes each; every one holds a shard of the trainer and an engine, or a part of one."""

    gpus: int
    memory: int


def parse_memory(text: str) -> int:
    """Bytes of "141GB" or "80 GiB"."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(GB|GIB)", text.strip().upper())
    if not found or not float(found[1]):
        raise ValueError(f"--gpu-memory {text!r}: give a size such as 141GB or 80GiB")
    return int(float(found[1]) * UNITS[found[2]])


def plan_report(recipe: Recipe, machine: Machine) -> Group:
    config = planned_config(recipe, None)
    needs = count_needs(recipe, config)
    split = needs.split(machine.gpus, machine.memory)
    shape, verdict = _shape_lines(recipe, config, needs), _verdict(recipe, config, needs, machine, split)
    return Group(Text("\n".join(shape)), _table(needs, machine, split), Text("\n".join(verdict)))


def _shape_lines(recipe: Recipe, config: PolicyConfig, needs: Needs) -> Iterator[str]:
    trained = f"{needs.trainable_parameters:,} of them trained" if recipe.lora else "all of them trained"
    yield f"parameters: {needs.parameters:,} in {config.num_hidden_layers} layers, {trained}"
    yield f"active: {needs.active_parameters:,} for a token, without embeddings and head"
    yield (
        f"a sequence in an engine: {needs.state_per_request / 2**20:,.1f} MiB of states, "
        f"{needs.open_chunk_per_request / 2**20:,.1f} MiB of open chunks, "
        f"{needs.kv_per_token / 2**10:,.1f} KiB of keys and values for each token"
    )
    least = -(-needs.engine_cache // 2**20)
    if least > recipe.rollout.memory_mb:
        yield (
            f"rollout.memory_mb = {recipe.rollout.memory_mb} is too little for rollout.max_batch = "
            f"{recipe.rollout.max_batch} sequences of {longest_sequence(recipe):,} tokens; planned with {least:,}"
        )


def _table(needs: Needs, machine: Machine, split: int | None) -> Table:
    """Where no split fits, the engine is shown over all GPUs: the least that each could be asked for."""
    gpus, over = machine.gpus, split or machine.gpus
    table = Table("GB", "of the run", f"on each of {gpus} GPUs" if gpus > 1 else "on one GPU")
    for name, size in (("weights", needs.weights), ("gradients", needs.gradients), ("optimizer", needs.optimizer)):
        table.add_row(f"trainer: {name}", _gb(size), _gb(size / gpus))
    working = needs.trainer(gpus) - needs.activations - _shard(needs, gpus)
    table.add_row("trainer: weights to multiply with", "", _gb(working))
    table.add_row("trainer: activations of a micro-batch (estimate)", "", _gb(needs.activations))
    engines = f"engine: weights, {_gpus(over)} an engine" if over > 1 else "engine: weights"
    table.add_row(engines, _gb(needs.engine_weights), _gb(needs.engine_weights / over))
    table.add_row("engine: cache", "", _gb(needs.engine_cache / over))
    table.add_section()
    table.add_row("all", "", _gb(_each(needs, gpus, over)))
    table.add_row(f"usable, {USABLE:.0%} of {_gb(machine.memory)}", "", _gb(USABLE * machine.memory))
    return table


def _verdict(recipe: Recipe, config: PolicyConfig, needs: Needs, machine: Machine, split: int | None) -> Iterator[str]:
    where = f"{_gpus(machine.gpus)} of {_gb(machine.memory)} GB"
    if split:
        yield f"fits on {where}" + (f", every engine on {split} of them" if split > 1 else "")
    else:
        missing = _each(needs, machine.gpus, machine.gpus) - USABLE * machine.memory
        yield f"does not fit on {where}: {_gb(missing)} GB too much on each. What would:"
        yield from (f"  {line}" for line in advice(recipe, config, machine))
    if machine.gpus > 1 and split:
        yield "note: this release trains in one process; the plan is for a trainer in even shards"


def advice(recipe: Recipe, config: PolicyConfig, machine: Machine) -> list[str]:
    """Changes that make it fit, the smallest first."""
    needs, adapted = count_needs(recipe, config), recipe.model_copy(update={"lora": _advised_lora(config)})
    lines = []
    if budget := _fitting_budget(recipe, needs, machine):
        lines.append(f"trainer.token_budget={budget}")
    if not recipe.lora and (budget := _fitting_budget(recipe, count_needs(adapted, config), machine)):
        assert adapted.lora
        targets = ", ".join(adapted.lora.targets)
        lines.append(f"lora={{rank: {ADVISED_RANK}, alpha: {2 * ADVISED_RANK}, targets: [{targets}]}}")
        lines[-1] += _with_budget(recipe, budget)
    larger = (Machine(gpus, machine.memory) for gpus in range(machine.gpus + 1, MOST_GPUS + 1))
    for each in larger:
        if budget := _fitting_budget(recipe, needs, each):
            lines.append(_gpus(each.gpus) + _with_budget(recipe, budget))
            break
    return lines or [f"nothing this plan knows of, up to {MOST_GPUS} GPUs; take larger GPUs or a smaller policy"]


def _with_budget(recipe: Recipe, budget: int) -> str:
    return f" with trainer.token_budget={budget}" if budget < recipe.trainer.token_budget else ""


def _advised_lora(config: PolicyConfig) -> LoraConfig:
    kinds = {name.rpartition(".")[2] for name in adaptable_modules(config)}
    targets = tuple(name for name in ADVISED_TARGETS if name in kinds)
    return LoraConfig(rank=ADVISED_RANK, alpha=2 * ADVISED_RANK, targets=targets)


def _fitting_budget(recipe: Recipe, needs: Needs, machine: Machine) -> int | None:
    """The recipe's token budget, halved until it fits; None if it does not fit while it holds a longest sequence."""
    budget = recipe.trainer.token_budget
    while budget >= longest_sequence(recipe):
        activations = needs.activations * budget // recipe.trainer.token_budget
        if replace(needs, activations=activations).split(machine.gpus, machine.memory):
            return budget
        budget //= 2
    return None


def _shard(needs: Needs, gpus: int) -> int:
    return -(-(needs.weights + needs.gradients + needs.optimizer) // gpus)


def _each(needs: Needs, gpus: int, split: int) -> int:
    return needs.trainer(gpus) + needs.engine(split)


def _gpus(count: int) -> str:
    return f"{count} GPUs" if count > 1 else "1 GPU"


def _gb(size: float) -> str:
    return f"{size / 10**9:,.{1 if size >= 10**10 else 3}f}"
