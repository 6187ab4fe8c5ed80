"""The policy that reinforcement learning starts from: a given folder, or one made here by a short warm start.

A made policy is kept in a cache under the digest of everything it depends on, so a second run skips the work. A run
always loads it from there, freshly made or not, so that both give the same bits.
"""

import hashlib
import importlib.metadata
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from policy.checkpoint import DTYPES, read_config
from policy.config import PolicyConfig
from policy.tokenizer import load_tokenizer, train_tokenizer
from rl.config import Recipe, WarmStartConfig, warm_start_digest
from rl.problems import supervised_examples
from rl.prompts import encode_problem

if TYPE_CHECKING:  # Ray comes with it, which commands without a run do not need
    from rl.system import System

TOKENIZER_EXAMPLES = 20_000
DIGESTED_EXAMPLES = 200
SECONDS_BETWEEN_LINES = 10.0


def cache_folder(recipe: Recipe) -> Path:
    """$XDG_CACHE_HOME/lockstep/base/DIGEST, under ~/.cache by default.

    The digest covers the recipe's part in the base policy, a sample of the worked solutions and the release, so that a
    changed generator or trainer does not serve an old policy.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    assert recipe.warm_start is not None
    data = recipe.data
    examples = supervised_examples(
        DIGESTED_EXAMPLES, recipe.seed, data.difficulty, data.families, recipe.warm_start.slip_rate
    )
    parts = [warm_start_digest(recipe), importlib.metadata.version("lockstep-rl"), repr(list(examples))]
    return root / "lockstep" / "base" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def base_policy(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, system: "System", console: Console) -> Path:
    """The Hugging Face folder of the base policy; makes it first, with the tokenizer given, where there is none."""
    if recipe.policy.path is not None:
        return Path(recipe.policy.path)
    folder = cache_folder(recipe)
    if folder.is_dir():
        console.print(f"base policy: from {folder}")
        return folder
    assert recipe.warm_start is not None
    config = made_config(recipe, len(tokenizer), tokenizer.eos_token_id)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    _warm_start(recipe, recipe.warm_start, config, tokenizer, system, console)
    system.save_policy(partial)
    tokenizer.save_pretrained(partial)
    _publish(partial, folder)
    return folder


def base_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the base policy, before there is one: the given folder's, or one made from worked solutions."""
    if recipe.policy.path is not None:
        return load_tokenizer(Path(recipe.policy.path))
    data = recipe.data
    examples = supervised_examples(TOKENIZER_EXAMPLES, recipe.seed, data.difficulty, data.families, 0.5)
    assert recipe.policy.vocab_size is not None
    return train_tokenizer((data.prompt(prompt) + solution for prompt, solution in examples), recipe.policy.vocab_size)


def planned_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> PolicyConfig:
    """The policy of a recipe, read or to be made; without a tokenizer, as large as the recipe allows."""
    source = recipe.policy
    if source.path is not None:
        return read_config(Path(source.path), source.chunk_size, source.decay_layer_index, source.fp8_linear)
    if tokenizer is not None:
        return made_config(recipe, len(tokenizer), tokenizer.eos_token_id)
    assert source.vocab_size is not None
    return made_config(recipe, source.vocab_size, 0)


def base_folder(recipe: Recipe) -> Path:
    """Where the base policy is, or will be once it is made."""
    return Path(recipe.policy.path) if recipe.policy.path is not None else cache_folder(recipe)


def made_config(recipe: Recipe, vocab_size: int, eos_token_id: int) -> PolicyConfig:
    source = recipe.policy
    chosen = {"decay_layer_index": source.decay_layer_index, "fp8_linear": source.fp8_linear}
    given = {name: value for name, value in chosen.items() if value is not None}
    own = {"lockstep": {"chunk_size": source.chunk_size, **given}}
    tokens = {"vocab_size": vocab_size, "eos_token_id": eos_token_id, "pad_token_id": eos_token_id}
    return PolicyConfig.from_hf({**source.config, **tokens, **own})


def _warm_start(
    recipe: Recipe,
    warm_start: WarmStartConfig,
    config: PolicyConfig,
    tokenizer: PreTrainedTokenizerBase,
    system: "System",
    console: Console,
) -> None:
    trainer = recipe.trainer.model_copy(
        update={"learning_rate": warm_start.learning_rate, "warmup_steps": warm_start.warmup_steps}
    )
    dtype = DTYPES[recipe.policy.dtype]
    start = system.trainer.start_supervised.remote(config, dtype, recipe.seed, trainer, warm_start.steps)
    console.print(
        f"base policy: {system.call('the policy', start)[0]:,} parameters, {warm_start.steps} supervised steps"
    )
    batches = _batches(recipe, warm_start, tokenizer)
    begin = last = time.monotonic()
    pending = system.trainer.supervised_step.remote(next(batches))
    for step in range(1, warm_start.steps + 1):
        # The next batch is made while the trainer works on this one.
        following = system.trainer.supervised_step.remote(next(batches)) if step < warm_start.steps else None
        metrics = system.call("a supervised step", pending)[0]
        pending = following
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES or step == warm_start.steps:
            last = time.monotonic()
            loss, seconds = metrics["supervised/loss"], last - begin
            console.print(f"  supervised step {step}/{warm_start.steps}  loss {loss:.3f}  {seconds:.0f} s")


def _batches(
    recipe: Recipe, warm_start: WarmStartConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[tuple[np.ndarray, int]]]:
    """Demonstrations (prompt and solution ids, prompt length): as many as fit a step's tokens, at least one."""
    data = recipe.data
    examples = supervised_examples(2**62, recipe.seed, data.difficulty, data.families, warm_start.slip_rate)
    encoded = (_encode(encode_problem(problem, data, tokenizer), solution, tokenizer) for problem, solution in examples)
    batch: list[tuple[np.ndarray, int]] = []
    tokens = 0
    for demonstration in encoded:
        if batch and tokens + len(demonstration[0]) > warm_start.tokens_per_step:
            yield batch
            batch, tokens = [], 0
        batch.append(demonstration)
        tokens += len(demonstration[0])


def _encode(prompt_ids: list[int], solution: str, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, int]:
    ids = itertools.chain(prompt_ids, tokenizer(solution)["input_ids"], [tokenizer.eos_token_id])
    return np.fromiter(ids, dtype=np.int64), len(prompt_ids)


def _publish(partial: Path, folder: Path) -> None:
    """Only whole folders ever bear the final name; a run that finished the same base first wins."""
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)
