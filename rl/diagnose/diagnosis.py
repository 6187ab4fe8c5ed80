"""The checks in their order, from data to operators; the first that finds something ends the search."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import ops
from rl.diagnose.data_checks import check_prompt, check_response_mask, check_shift
from rl.diagnose.evidence import Evidence
from rl.diagnose.finding import Finding
from rl.diagnose.operator_checks import check_operators
from rl.diagnose.sampler_checks import check_limits, check_temperature
from rl.diagnose.setting_checks import check_decay, check_eps, check_head, check_snapshot, check_state
from rl.diagnose.weight_checks import check_staleness, check_weights

Check = Callable[[Evidence], Finding | None]
CHECKS: tuple[tuple[str, Check], ...] = (
    ("response mask", check_response_mask),
    ("shift of log-probs", check_shift),
    ("prompt and chat template", check_prompt),
    ("temperature", check_temperature),
    ("top-k, top-p, min-p", check_limits),
    ("weights", check_weights),
    ("staleness", check_staleness),
    ("decay convention", check_decay),
    ("RMSNorm eps", check_eps),
    ("LM head", check_head),
    ("recurrent state", check_state),
    ("prefix cache", check_snapshot),
    ("operators", check_operators),
)


@dataclass(frozen=True)
class Outcome:
    check: str
    result: Literal["passed", "found", "not needed"]


@dataclass(frozen=True)
class Diagnosis:
    """mismatch: largest difference of the two records, in nats. suspect: "engine" or "trainer"."""

    folder: Path
    step: int
    sequences: int
    tokens: int
    tokens_unequal: int
    mismatch: float
    suspect: str
    outcomes: list[Outcome]
    finding: Finding | None

    @property
    def verdict(self) -> str:
        """Two sentences: the cause, and what to do."""
        if self.finding is None:
            return "No difference: trainer and engine agree in every bit of this sample. There is nothing to correct."
        return f"{_sentence(f'{self.finding.name}: {self.finding.what}')} {_sentence(self.finding.remedy)}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "verdict": self.verdict}


def diagnose(folder: Path) -> Diagnosis:
    """folder: a saved sample, RUN/mismatch/step-NNNNNN. Raises ValueError when it is none."""
    evidence = Evidence(folder)
    ops.use_fast(evidence.sample.recipe.ops.fast)
    try:
        outcomes, finding = _search(evidence)
        return Diagnosis(
            folder,
            evidence.sample.step,
            len(evidence.sequences),
            sum(len(each.completion_ids) for each in evidence.sequences),
            sum(int(each.unequal.sum()) for each in evidence.sequences),
            evidence.mismatch,
            evidence.suspect,
            outcomes,
            finding,
        )
    finally:
        ops.use_fast([])


def _search(evidence: Evidence) -> tuple[list[Outcome], Finding | None]:
    outcomes: list[Outcome] = []
    finding: Finding | None = None
    for name, check in CHECKS:
        if finding:
            outcomes.append(Outcome(name, "not needed"))
        else:
            finding = check(evidence)
            outcomes.append(Outcome(name, "found" if finding else "passed"))
    return outcomes, finding or _unexplained(evidence)


def _unexplained(evidence: Evidence) -> Finding | None:
    """A mismatch without a cause is said to be one."""
    if not evidence.mismatch:
        return _beyond_the_sampled(evidence.sample.full_vocab_unequal)
    kind = evidence.sample.engine.get("engine")
    if evidence.sample.engine_trace is None and kind != "local":
        return Finding(
            "kernels of the engine",
            f"prompts, sampler, weights and settings agree, and the records differ by up to {evidence.mismatch:.3g} "
            f"nats, which is left to the kernels of {kind}",
            f"rollout.engine = {kind}",
            "sample with rollout.engine=local to agree in every bit, or correct the difference in the loss",
            {"mismatch": evidence.mismatch},
        )
    return Finding(
        "not reproduced",
        f"the {evidence.suspect}'s record is up to {evidence.base_gap:.3g} nats off, and the same tokens through the "
        "same forward show no operator that differs",
        f"what the {evidence.suspect} does outside its forward: batching, caches, memory",
        "run `lockstep doctor` on that worker's machine, and repeat the step with rollout.workers=1 and "
        "rollout.max_batch=1",
        {"mismatch": evidence.mismatch, "expected_differs_by": evidence.base_gap},
    )


def _beyond_the_sampled(entries: int) -> Finding | None:
    """The log-probs of sampled tokens agree; those of other tokens may not."""
    if not entries:
        return None
    return Finding(
        "not reproduced",
        f"{entries} log-probs of tokens that were not sampled differed in that step; those of sampled tokens agree, "
        "and no operator differs on them",
        "how the engine keeps log-probs of the whole vocabulary",
        "run `lockstep doctor` on the machine of each worker, and repeat the step with a larger "
        "loop.full_vocab_sequences",
        {"full_vocab_unequal": entries},
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
