"""`lockstep export --verify`: reads an exported policy back and compares it with the checkpoint it came from."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from policy.checkpoint import DTYPES, load_policy
from policy.digest import weights_digest
from policy.tokenizer import load_tokenizer
from rl.config import load_recipe
from rl.export import read_manifest, restore_policy
from rl.prompts import uses_chat
from rl.run_folder import RunFolder
from trainer.batch import TrainSample
from trainer.state import checkpoint_path
from trainer.trainer import Trainer

ROLLOUTS = 8


def verify_export(run_dir: Path, folder: Path) -> str:
    """What was found, in a sentence: every tensor has its digest, and rollouts of the run have the log-probs that they
    have under the checkpoint, in every bit unless the weights exported are coarser than the run's.

    The rollouts are the newest texts in the run folder, encoded by the tokenizer of the export. Raises ValueError when
    something differs that must not.
    """
    run, manifest = RunFolder.open(run_dir), read_manifest(folder)
    if weights_digest(manifest["tensor_digests"]) != manifest["weights_digest"]:
        raise ValueError(f"the digests in the manifest of {folder} contradict each other; export again")
    recipe = load_recipe(run.recipe)
    exported = load_policy(folder, DTYPES[recipe.policy.dtype])  # compares every tensor with its digest
    digests = f"{len(manifest['tensor_digests'])} tensors have their digests"
    positions = exported.config.max_position_embeddings
    tokenizer = load_tokenizer(folder)
    whole = uses_chat(recipe.data, tokenizer)
    samples = list(itertools.islice(_samples(run, tokenizer, whole, positions), ROLLOUTS))
    if not samples:
        return f"{digests}; no log-probs compared, as the run kept no rollouts (loop.rollouts_saved)"
    trained, _ = restore_policy(run, recipe, checkpoint_path(run.checkpoints, manifest["step"]))
    before, after = (
        np.concatenate(Trainer(policy, recipe.trainer, recipe.rollout.temperature).log_probs(samples))
        for policy in (trained, exported)
    )
    tokens = f"log-probs of {len(before)} tokens of {len(samples)} rollouts"
    if np.array_equal(before, after):
        return f"{digests}; {tokens} equal those of the checkpoint in every bit"
    apart = np.abs(before - after)
    found = (
        f"{tokens} differ from those of the checkpoint by {apart.mean():.2g} on average and {apart.max():.2g} at most"
    )
    if manifest["dtype"] in ("float32", recipe.policy.dtype):
        raise ValueError(f"{folder}: {found}, though its weights are as fine as the run's; do not use it, export again")
    return f"{digests}; {found}, as {manifest['dtype']} weights are coarser than the run's {recipe.policy.dtype}"


def _samples(run: RunFolder, tokenizer: PreTrainedTokenizerBase, whole: bool, positions: int) -> Iterator[TrainSample]:
    """Completions of the newest step, cut to the positions that the policy has; whole: prompts that have their special
    tokens already."""
    newest = sorted(run.rollouts(0).parent.glob("step_*.jsonl"))[-1:]
    for group in map(json.loads, itertools.chain.from_iterable(path.read_text().splitlines() for path in newest)):
        prompt = tokenizer(group["prompt"], add_special_tokens=not whole)["input_ids"]
        for completion in group["completions"]:
            answer = tokenizer(completion["text"], add_special_tokens=False)["input_ids"]
            ids = np.array([*prompt, *answer][:positions], dtype=np.int64)
            if 0 < len(prompt) < len(ids):
                yield TrainSample.demonstration(ids, len(prompt))
