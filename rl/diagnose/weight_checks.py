"""Whether the engine computed with the trainer's weights: digests of every tensor, and which version they were."""

import numpy as np
import torch
from torch import Tensor

from policy.names import load_tensors, named_views
from policy.transformer import Policy
from rl.diagnose.evidence import Evidence, gap
from rl.diagnose.finding import Finding

LISTED = 5
_KINDS = {
    "stale tensor": "of an older version of the weights",
    "transposed expert": "an expert's matrix, transposed",
    "transposed tensor": "a matrix, transposed",
    "misplaced tensor": "what belongs into another tensor",
    "rounded tensor": "rounded to BF16",
    "different tensor": "of unknown origin",
}
_REMEDIES = {
    "stale tensor": "send every tensor with each version, and refuse a version whose digests differ",
    "different tensor": "load the weights anew and compare digests; if they differ again, doubt that machine's memory",
}
_LOADING = "correct the engine's loading of this tensor: its name, its layout, its type"


def check_weights(evidence: Evidence) -> Finding | None:
    """An engine that cannot give digests passes: there is nothing to compare."""
    sample = evidence.sample
    theirs = sample.engine_digests
    names = [name for name, digest in sample.trainer_digests.items() if theirs.get(name, digest) != digest]
    names += [name for name in theirs if name not in sample.trainer_digests]
    if not names:
        return None
    views = named_views(evidence.policy)
    kinds = {name: _kind(evidence, name, views.get(name)) for name in names}
    kind = max(_KINDS, key=lambda each: sum(found == each for found in kinds.values()))
    listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    return Finding(
        kind,
        f"{len(names)} of {len(sample.trainer_digests)} tensors of the engine differ from the trainer's: {listed} "
        f"({_KINDS[kind]})",
        "the way of the weights from trainer to engine",
        _REMEDIES.get(kind, _LOADING),
        {"tensors": len(names), "first": names[0], **_residual(evidence)},
    )


def _kind(evidence: Evidence, name: str, ours: Tensor | None) -> str:
    sample = evidence.sample
    digest = sample.engine_digests[name]
    if any(older.get(name) == digest for older in sample.older_digests.values()):
        return "stale tensor"
    theirs = sample.engine_tensors.get(name)
    if ours is None or theirs is None or not evidence.has_witnessed_weights:
        return "different tensor"
    ours = ours.to(theirs.dtype)
    if ours.ndim == 2 and torch.equal(ours.t().reshape(ours.shape), theirs):
        return "transposed expert" if ".experts." in name else "transposed tensor"
    if digest in sample.trainer_digests.values():
        return "misplaced tensor"
    return "rounded tensor" if torch.equal(ours.bfloat16().to(ours.dtype), theirs) else "different tensor"


def _residual(evidence: Evidence) -> dict[str, float | int | str]:
    """What is left of the difference when the log-probs are computed with the engine's own tensors."""
    sample = evidence.sample
    views = named_views(evidence.policy)
    known = {name: tensor for name, tensor in sample.engine_tensors.items() if name in views}
    if not known or not evidence.has_witnessed_weights:
        return {}
    policy = _with_tensors(evidence.load_policy(), known)
    hypothesis = [evidence.completion(each, policy) for each in evidence.sequences]
    return {"difference": evidence.base_gap, "residual": gap(hypothesis, evidence.observed)}


def _with_tensors(policy: Policy, tensors: dict[str, Tensor]) -> Policy:
    load_tensors(policy, {**named_views(policy), **tensors})
    return policy


def check_staleness(evidence: Evidence) -> Finding | None:
    """Tokens of older versions have other log-probs under the newest; that is no fault of an operator."""
    version = evidence.sample.policy_version
    found = np.concatenate([each.policy_versions for each in evidence.sequences])
    old = found != version
    if not old.any() or not evidence.mismatch:
        return None
    lag = int(np.abs(version - found).max())
    return Finding(
        "stale policy",
        f"{int(old.sum())} of {len(found)} tokens were sampled up to {lag} versions away from version {version}, under "
        "which the trainer scored them",
        "loop.max_staleness",
        "score tokens under the version that they were sampled from, or correct the loss for staleness",
        {"tokens": int(old.sum()), "policy_version": version, "staleness_max": lag},
    )
