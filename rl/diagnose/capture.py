"""Saving a mismatch while the run still stands: asks every process what it knows, and writes it to the run folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rl.config import Recipe
from rl.diagnose.evidence import gap
from rl.diagnose.sample import Sample, sample_folder, save_sample
from rl.diagnose.sample import Sequence as SampledSequence
from rl.diagnose.traces import Trace, first_difference
from rl.diagnose.witness import Witness
from rl.rollouts import Scored
from rl.run_folder import RunFolder
from rl.system import System
from trainer.batch import TrainSample

MAX_SEQUENCES = 8
MAX_SAMPLES = 2  # of a run: each holds the whole policy
Compared = tuple[Scored, np.ndarray]
"""A completion and the trainer's log-probs of it, float32 [n]."""


def capture_mismatch(
    system: System,
    folder: RunFolder,
    recipe: Recipe,
    step: int,
    scored: Sequence[Scored],
    log_probs: Sequence[np.ndarray],
    full_vocab_unequal: int = 0,
) -> Path | None:
    """Saves the sequences that differ most; None where the run has saved MAX_SAMPLES, or none can be compared.

    log_probs: the trainer's by its weights of version step - 1, float32 [n] each. full_vocab_unequal: entries that
    differed in the step. Raises OSError when the disk is full.
    """
    target = sample_folder(folder.path, step)
    if len(list(target.parent.glob("step-*"))) >= MAX_SAMPLES:
        return None
    version, compared = _of_one_version(system, recipe, step, scored, log_probs)
    if not compared:
        return None
    worst = sorted(compared, key=_severity, reverse=True)[:MAX_SEQUENCES]
    sample = _witnessed(system, recipe, step, version, worst)
    sample = replace(sample, full_vocab_unequal=full_vocab_unequal)
    save_sample(target, sample, lambda path: system.save_policy(path, folder.base, version))
    return target


def _of_one_version(
    system: System, recipe: Recipe, step: int, scored: Sequence[Scored], log_probs: Sequence[np.ndarray]
) -> tuple[int, list[Compared]]:
    """A version of the weights, and what was compared under it. In an asynchronous run the newest that has whole
    completions: those that several versions sampled are left out."""
    if not recipe.loop.max_staleness:
        return step - 1, list(zip(scored, log_probs, strict=True))
    whole = [each for each in scored if len(np.unique(each.completion.policy_versions)) == 1]
    version = max((int(each.completion.policy_versions[0]) for each in whole), default=step - 1)
    chosen = [each for each in whole if each.completion.policy_versions[0] == version]
    versions = [each.completion.policy_versions for each in chosen]
    rescored = system.log_probs_of_versions([each.to_sample() for each in chosen], versions)
    return version, list(zip(chosen, rescored, strict=True))


def _witnessed(system: System, recipe: Recipe, step: int, version: int, worst: Sequence[Compared]) -> Sample:
    """The sequences, and what every process says of itself under the weights that it has now."""
    samples = [scored.to_sample() for scored, _ in worst]
    traced = min(range(len(worst)), key=lambda at: _shortest_failure(worst[at]))
    prefix = _prefix(samples[traced], _shortest_failure(worst[traced])[1])
    trainer, engines = system.witnesses(samples, prefix)
    worker = _worker_to_blame(trainer, engines)
    engine = engines[worker]
    differing = [name for name, digest in engine.digests.items() if trainer.digests.get(name) != digest]
    older = {version: sent for version, sent in system.sent_digests.items() if version < trainer.policy_version}
    return Sample(
        step=step,
        policy_version=version,
        recipe=recipe,
        sampling=recipe.rollout.model_dump(include={"temperature", "top_p", "top_k"}),
        engine={**engine.description, "worker": worker},
        sequences=[_sequence(*pair, mask) for pair, mask in zip(worst, trainer.masks, strict=True)],
        witness_version=trainer.policy_version,
        trainer_digests=trainer.digests,
        engine_digests=engine.digests,
        older_digests=older,
        engine_tensors=system.engine_tensors(worker, differing) if differing else {},
        trainer_trace=trainer.trace,
        engine_trace=engine.trace,
        traced=traced,
        traced_length=len(prefix.input_ids),
    )


def _severity(pair: Compared) -> tuple[float, bool]:
    """The largest difference; among equals those whose whole vocabulary was compared come first."""
    scored, log_probs = pair
    completion = scored.completion
    return gap([log_probs], [completion.log_probs]), completion.full_log_probs is not None


def _shortest_failure(pair: Compared) -> tuple[bool, int]:
    """Whether the sequence agrees, and its completion tokens up to the first that does not; to be sorted by."""
    scored, log_probs = pair
    unequal = ~(log_probs == scored.completion.log_probs)
    return (False, int(unequal.argmax()) + 1) if unequal.any() else (True, len(log_probs))


def _prefix(sample: TrainSample, tokens: int) -> TrainSample:
    """The sample with the first `tokens` of its completion."""
    ids = sample.input_ids[: sample.prompt_length + tokens]
    return TrainSample(ids, sample.prompt_length, sample.rollout_log_probs[:tokens], sample.advantage)


def _worker_to_blame(trainer: Witness, engines: Sequence[Witness]) -> int:
    """The first engine with other weights; else the first whose operators gave other bits; else the first."""
    for worker, engine in enumerate(engines):
        if engine.digests and engine.digests != trainer.digests:
            return worker
    for worker, engine in enumerate(engines):
        if _differ(trainer.trace, engine.trace):
            return worker
    return 0


def _differ(ours: Trace | None, theirs: Trace | None) -> bool:
    return ours is not None and theirs is not None and first_difference(ours, theirs) is not None


def _sequence(scored: Scored, log_probs: np.ndarray, mask: np.ndarray) -> SampledSequence:
    completion, prompt = scored.completion, scored.prompt
    return SampledSequence(
        prompt.row,
        completion.sample,
        prompt.text,
        completion.finish_reason,
        prompt.token_ids,
        completion.token_ids,
        completion.log_probs,
        log_probs,
        mask,
        completion.policy_versions,
    )
