"""What trainer and engine say of themselves in their own processes, where the fault is, when a mismatch shows."""

from dataclasses import dataclass

import numpy as np

from policy.digest import tensor_digest
from policy.lora import merged
from policy.names import export_tensors
from policy.transformer import Policy
from rl.diagnose.traces import Trace, trace_decoding, trace_training
from rl.weight_sync import WeightPackage, pack_weights
from rollout.engine import Engine
from rollout.verbs import RolloutEngine
from trainer.batch import PackedBatch, TrainSample
from trainer.trainer import Trainer


@dataclass(frozen=True, eq=False)
class Witness:
    """digests: of every tensor by the family's names; empty, and no trace, where an engine keeps its policy to itself.

    masks: bool [prompt + completion] for each sample, as the trainer used it; the engine has none.
    """

    policy_version: int
    description: dict[str, object]
    digests: dict[str, str]
    trace: Trace | None
    masks: list[np.ndarray]


def engine_witness(engine: RolloutEngine, traced: TrainSample, temperature: float) -> Witness:
    description = engine.describe()
    version = int(str(description["policy_version"]))
    if not isinstance(engine, Engine):
        return Witness(version, description, {}, None, [])
    trace = trace_decoding(engine.policy, traced.input_ids, traced.prompt_length, temperature)
    return Witness(version, description, _digests(engine.policy), trace, [])


def engine_tensors(engine: RolloutEngine, names: list[str]) -> WeightPackage:
    assert isinstance(engine, Engine), "an engine that gave no digests"
    tensors = export_tensors(engine.policy)
    return pack_weights({name: tensors[name] for name in names}, engine.policy_version)


def trainer_witness(trainer: Trainer, samples: list[TrainSample], traced: TrainSample) -> Witness:
    """The masks are made as for the gradients."""
    policy = trainer.policy
    trace = trace_training(policy, traced.input_ids, traced.prompt_length, trainer.temperature)
    masks = [PackedBatch.pack([sample]).response_mask.numpy() for sample in samples]
    return Witness(trainer.policy_version, {}, _digests(merged(policy)), trace, masks)


def _digests(policy: Policy) -> dict[str, str]:
    return {name: tensor_digest(tensor) for name, tensor in export_tensors(policy).items()}
