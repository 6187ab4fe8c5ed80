"""A mismatch on disk: RUN/mismatch/step-NNNNNN/, everything that is needed to find its cause, now or later.

sample.json                  what the run, the engine and the trainer said of themselves; digests of every tensor
sequences.safetensors        tokens, log-probs of both sides, response mask, policy versions
policy/                      the trainer's weights, config and tokenizer, as a Hugging Face folder
engine_weights.safetensors   the engine's tensors that differ from the trainer's
trainer_trace.safetensors    what each operator returned in the trainer, and in the engine, on the shortest
engine_trace.safetensors     beginning of a sequence that shows the mismatch
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl.config import Recipe
from rl.data_columns import Row
from rl.diagnose.traces import Trace

FORMAT = 1
_ARRAYS = ("prompt_ids", "completion_ids", "rollout_log_probs", "log_probs", "response_mask", "policy_versions")


@dataclass(frozen=True, eq=False)
class Sequence:
    """One prompt with one completion, as both sides saw it."""

    row: Row
    sample: int
    prompt_text: str
    finish_reason: str
    prompt_ids: np.ndarray  # int64 [prompt]
    completion_ids: np.ndarray  # int64 [n]
    rollout_log_probs: np.ndarray  # float32 [n], the engine's record
    log_probs: np.ndarray  # float32 [n], the trainer's
    response_mask: np.ndarray  # bool [prompt + n], as the trainer used it
    policy_versions: np.ndarray  # int64 [n], of the weights each token was sampled from

    @property
    def token_ids(self) -> np.ndarray:
        return np.concatenate([self.prompt_ids, self.completion_ids])

    @property
    def unequal(self) -> np.ndarray:
        """bool [n]; NaN equals nothing."""
        return ~(self.log_probs == self.rollout_log_probs)


@dataclass(frozen=True, eq=False)
class Sample:
    """policy_version: of the weights that were compared, which policy/ holds. witness_version: of those that trainer
    and engine had when they were asked, which digests and traces are of; a newer one in an asynchronous run.
    digests: name -> SHA-256; older_digests: by version, as they were sent.

    traced: which sequence the traces are of, and traced_length how many of its tokens; None where there are none.
    """

    step: int
    policy_version: int
    witness_version: int
    recipe: Recipe
    sampling: dict[str, Any]
    engine: dict[str, Any]  # what it describes itself as
    sequences: list[Sequence]
    trainer_digests: dict[str, str]
    engine_digests: dict[str, str]  # empty where the engine cannot tell
    older_digests: dict[int, dict[str, str]] = field(default_factory=dict)
    engine_tensors: dict[str, Tensor] = field(default_factory=dict)
    trainer_trace: Trace | None = None
    engine_trace: Trace | None = None
    full_vocab_unequal: int = 0  # entries of full-vocabulary rows that differed in that step
    traced: int = 0
    traced_length: int = 0

    @property
    def temperature(self) -> float:
        """The one the recipe gives to engine and trainer."""
        return self.recipe.rollout.temperature


def sample_folder(run: Path, step: int) -> Path:
    return run / "mismatch" / f"step-{step:06d}"


def first_sample(run: Path) -> Path:
    """The first mismatch that a run saved. Raises ValueError when there is none."""
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} is not a run folder (no recipe.yaml); give RUN, or one mismatch with --sample DIR")
    saved = sorted((run / "mismatch").glob("step-*/sample.json"))
    if not saved:
        raise ValueError(
            f"{run} has saved no mismatch: trainer and engine agreed in every step, or no alarm on mismatch/ sounded; "
            "there is nothing to diagnose"
        )
    return saved[0].parent


def save_sample(folder: Path, sample: Sample, save_policy: Callable[[Path], None]) -> None:
    """Writes the folder as a whole or not at all. save_policy: writes the trainer's weights to a folder."""
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        save_policy(unfinished / "policy")
        save_file(_sequence_tensors(sample.sequences), unfinished / "sequences.safetensors")
        if sample.engine_tensors:
            save_file(sample.engine_tensors, unfinished / "engine_weights.safetensors")
        _save_trace(unfinished / "trainer_trace.safetensors", sample.trainer_trace)
        _save_trace(unfinished / "engine_trace.safetensors", sample.engine_trace)
        (unfinished / "sample.json").write_text(json.dumps(_facts(sample), indent=2) + "\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def load_sample(folder: Path) -> Sample:
    """Raises ValueError when the folder holds no sample, or a damaged one."""
    path = folder / "sample.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no saved mismatch (no sample.json); give one of RUN/mismatch/step-*")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"{path}: format {facts['format']}, but {FORMAT} is read; use the version that wrote it")
        arrays = load_file(folder / "sequences.safetensors")
        weights = folder / "engine_weights.safetensors"
        return Sample(
            step=facts["step"],
            policy_version=facts["policy_version"],
            witness_version=facts["witness_version"],
            recipe=Recipe.model_validate_json(json.dumps(facts["recipe"])),
            sampling=facts["sampling"],
            engine=facts["engine"],
            sequences=[_sequence(each, index, arrays) for index, each in enumerate(facts["sequences"])],
            trainer_digests=facts["trainer_digests"],
            engine_digests=facts["engine_digests"],
            older_digests={int(version): digests for version, digests in facts["older_digests"].items()},
            engine_tensors=load_file(weights) if weights.is_file() else {},
            trainer_trace=_load_trace(folder / "trainer_trace.safetensors"),
            engine_trace=_load_trace(folder / "engine_trace.safetensors"),
            full_vocab_unequal=facts["full_vocab_unequal"],
            traced=facts["traced"],
            traced_length=facts["traced_length"],
        )
    except (KeyError, TypeError, json.JSONDecodeError, SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{folder}: the saved mismatch is damaged: {type(error).__name__}: {error}") from error


def _facts(sample: Sample) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": sample.step,
        "policy_version": sample.policy_version,
        "witness_version": sample.witness_version,
        "sampling": sample.sampling,
        "engine": sample.engine,
        "full_vocab_unequal": sample.full_vocab_unequal,
        "traced": sample.traced,
        "traced_length": sample.traced_length,
        "sequences": [_sequence_facts(each) for each in sample.sequences],
        "recipe": sample.recipe.model_dump(mode="json"),
        "trainer_digests": sample.trainer_digests,
        "engine_digests": sample.engine_digests,
        "older_digests": sample.older_digests,
    }


def _sequence_facts(sequence: Sequence) -> dict[str, Any]:
    row = {name: value for name, value in asdict(sequence.row).items() if name not in ("columns", "pass_rate")}
    texts = {"prompt_text": sequence.prompt_text, "finish_reason": sequence.finish_reason}
    return {"row": row, "sample": sequence.sample, **texts}


def _sequence(facts: dict[str, Any], index: int, arrays: dict[str, Tensor]) -> Sequence:
    row = dict(facts["row"])
    row["messages"] = tuple((role, content) for role, content in row["messages"])
    found = {name: arrays[f"{index}.{name}"].numpy() for name in _ARRAYS}
    return Sequence(Row(**row), facts["sample"], facts["prompt_text"], facts["finish_reason"], **found)


def _sequence_tensors(sequences: list[Sequence]) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": torch.from_numpy(np.array(getattr(sequence, name)))
        for index, sequence in enumerate(sequences)
        for name in _ARRAYS
    }


def _save_trace(path: Path, trace: Trace | None) -> None:
    if trace is not None:  # names are sorted when read back, so they are numbered
        tensors: dict[str, Tensor] = {}
        for place, (name, parts) in enumerate(trace.outputs.items()):
            tensors |= {f"{place:05d} {name} {part}": tensor.contiguous() for part, tensor in enumerate(parts)}
        save_file(tensors, path)


def _load_trace(path: Path) -> Trace | None:
    if not path.is_file():
        return None
    outputs: dict[str, tuple[Tensor, ...]] = {}
    with safe_open(path, framework="pt") as file:
        for key in sorted(file.keys()):
            _, name, _ = key.split(" ")
            outputs[name] = (*outputs.get(name, ()), file.get_tensor(key))
    return Trace(outputs)
