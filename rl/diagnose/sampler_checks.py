"""The transform between logits and the recorded log-prob: temperature, top-k, top-p, min-p."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rl.diagnose.evidence import Evidence, is_explained
from rl.diagnose.finding import Finding

MAX_TOKENS = 128  # whose whole vocabulary is looked at
TEMPERATURES = (0.05, 20.0)
Limits = tuple[int, float, float]  # top_k, top_p, min_p
# What engines and generation configs set when nobody asks for it.
COMMON_LIMITS: tuple[Limits, ...] = (
    (0, 0.95, 0.0), (0, 0.9, 0.0), (0, 0.8, 0.0), (0, 0.7, 0.0), (20, 1.0, 0.0), (40, 1.0, 0.0), (50, 1.0, 0.0),
    (20, 0.95, 0.0), (20, 0.8, 0.0), (40, 0.95, 0.0), (50, 0.95, 0.0), (0, 1.0, 0.05), (0, 1.0, 0.1),
)  # fmt: skip


def check_temperature(evidence: Evidence) -> Finding | None:
    """Solves for the temperature under which the logits give the suspect's record."""
    if not evidence.base_gap:
        return None
    rows, tokens, observed = _rows(evidence)
    solved = _solve(rows * evidence.sample.temperature, tokens, observed)
    for temperature in (*(float(f"{solved:.{digits}g}") for digits in (1, 2, 3, 4)), solved):
        residual = evidence.residual(partial(_under, evidence, temperature))
        if residual is not None:
            break
    else:
        return None
    asked = evidence.sample.temperature
    return Finding(
        "wrong temperature",
        f"the {evidence.suspect}'s log-probs are those at temperature {temperature:g}, the recipe says {asked:g}",
        "rollout.temperature",
        f"give the {evidence.suspect} temperature {asked:g}, and record log-probs after the temperature",
        {"temperature": temperature, "expected": asked, "residual": residual},
    )


def check_limits(evidence: Evidence) -> Finding | None:
    """Whether the record is of a distribution that top-k, top-p or min-p has cut and renormalised."""
    if not evidence.base_gap:
        return None
    rows, tokens, observed = _rows(evidence)
    expected = rows.gather(1, tokens[:, None]).squeeze(1)
    before = float((expected - observed).abs().max())
    for top_k, top_p, min_p in _limits(evidence.sample.sampling):
        cut = _renormalised(rows, top_k, top_p, min_p).gather(1, tokens[:, None]).squeeze(1)
        residual = float((cut - observed).abs().nan_to_num(torch.inf).max())
        if is_explained(before, residual):
            set_to = f"top_k = {top_k}, top_p = {top_p:g}, min_p = {min_p:g}"
            return Finding(
                "truncated distribution",
                f"the {evidence.suspect}'s log-probs are renormalised under {set_to}",
                "top_k, top_p and min_p of the engine, and its generation config",
                "sample from the whole vocabulary while training, or record log-probs before any limit",
                {"top_k": top_k, "top_p": top_p, "min_p": min_p, "residual": residual},
            )
    return None


def _rows(evidence: Evidence) -> tuple[Tensor, Tensor, Tensor]:
    """Of up to MAX_TOKENS tokens that differ: log-probs over the vocabulary FP64 [N, V], token ids, the record."""
    rows, tokens, records, left = [], [], [], MAX_TOKENS
    for hidden, each, observed, expected in zip(
        evidence.hidden, evidence.sequences, evidence.observed, evidence.expected, strict=True
    ):
        chosen = np.flatnonzero(~(observed == expected))[:left]
        left -= len(chosen)
        at = torch.from_numpy(chosen + len(each.prompt_ids) - 1).to(hidden.device)
        full = evidence.policy.full_log_probs(hidden[at], evidence.sample.temperature)
        rows.append(full.cpu().double())
        tokens.append(torch.from_numpy(each.completion_ids[chosen]))
        records.append(torch.from_numpy(observed[chosen]).double())
    return torch.cat(rows), torch.cat(tokens), torch.cat(records)


def _solve(logits: Tensor, tokens: Tensor, observed: Tensor) -> float:
    """The temperature of least squared difference, by ever finer grids. logits: up to a constant of each row."""
    low, high = np.log(TEMPERATURES)
    for _ in range(8):
        grid = np.linspace(low, high, 17)
        errors = [float((_at(logits, tokens, np.exp(t)) - observed).square().sum()) for t in grid]
        best, step = grid[int(np.argmin(errors))], grid[1] - grid[0]
        low, high = best - step, best + step
    return float(np.exp(best))


def _at(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


def _under(evidence: Evidence, temperature: float, place: int) -> np.ndarray:
    each = evidence.sequences[place]
    rows = evidence.hidden[place][len(each.prompt_ids) - 1 :]
    return evidence.log_probs(evidence.policy, rows, each.completion_ids, temperature)


def _limits(sampling: dict[str, float]) -> Iterator[Limits]:
    """Those that the engine was given first."""
    asked = int(sampling.get("top_k", 0)), float(sampling.get("top_p", 1.0)), float(sampling.get("min_p", 0.0))
    yield from dict.fromkeys((asked, *COMMON_LIMITS))


def _renormalised(rows: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """rows: log-probs [N, V]; minus infinity for what is cut."""
    ranked, order = rows.exp().sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(rows.shape[1])
    beyond = (ranked.cumsum(-1) - ranked >= top_p) & (top_p < 1) | (rank >= (top_k or rows.shape[1]))
    kept = ranked.masked_fill((rank > 0) & (beyond | (ranked < min_p * ranked[:, :1])), 0.0)
    return torch.zeros_like(rows).scatter_(1, order, kept / kept.sum(-1, keepdim=True)).log()
