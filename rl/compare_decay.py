"""`lockstep eval --compare-decay`: which of the two published decay conventions the weights were trained with.

Checkpoints of Ring-linear do not say how their layers are counted for the decay, and public code disagrees: a lightning
layer forgets as its own index says (engine), or as that of the layer before (hf). The wrong one costs likelihood.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import ops
from policy.checkpoint import load_policy, read_config
from policy.families import find_family
from policy.machine import choose_device
from policy.tokenizer import load_tokenizer
from policy.transformer import Policy

CONVENTIONS = ("engine", "hf")
LONGEST_CHUNK, SHORTEST_CHUNK = 2048, 32  # tokens; the longer, the further the conventions part
FEWEST_CHUNKS = 8  # to estimate an error from
STANDARD_ERRORS = 3.0  # the rule: a smaller difference decides nothing


@dataclass(frozen=True)
class Fit:
    """losses: nats per token of every chunk, float64 [chunks], under each of CONVENTIONS; tokens: scored in each."""

    losses: tuple[np.ndarray, np.ndarray]
    tokens: int
    left_over: int

    @property
    def difference(self) -> float:
        """Nats per token by which hf is worse than engine; negative where it is better."""
        return float((self.losses[1] - self.losses[0]).mean())

    @property
    def error(self) -> float:
        """Standard error of the difference: the chunks are compared pair by pair."""
        apart = self.losses[1] - self.losses[0]
        return float(apart.std(ddof=1) / math.sqrt(len(apart)))

    @property
    def verdict(self) -> str:
        """ "engine", "hf" or "undecided"."""
        if abs(self.difference) <= STANDARD_ERRORS * self.error:
            return "undecided"
        return CONVENTIONS[0 if self.difference > 0 else 1]


def compare_decay(folder: Path, text_file: Path) -> str:
    """The comparison in words. Raises ValueError for a policy without lightning layers and a text that is too short."""
    config = read_config(folder)
    if "decay_layer_index" not in find_family(config.model_type).own:
        raise ValueError(f"{folder}: a {config.model_type} policy has no lightning layers, so no decay to compare")
    ids = _token_ids(folder, text_file)
    length = chunk_length(len(ids), config.max_position_embeddings, text_file)
    fit = score_both(folder, ids, length)
    return _report(fit, config.decay_layer_index, text_file)


def chunk_length(tokens: int, positions: int, text_file: Path) -> int:
    """The longest that is allowed and leaves FEWEST_CHUNKS of them."""
    length = min(LONGEST_CHUNK, positions, tokens // FEWEST_CHUNKS)
    if length < SHORTEST_CHUNK:
        raise ValueError(
            f"{text_file}: {tokens} tokens; the comparison needs {FEWEST_CHUNKS} chunks of at least {SHORTEST_CHUNK}, "
            "better of 2048: give a longer text of the kind that the policy was trained on"
        )
    return length


def score_both(folder: Path, ids: Sequence[int], length: int) -> Fit:
    """Both conventions on the same whole chunks of `length` tokens, one policy in memory at a time."""
    count = len(ids) // length
    chunks = torch.tensor(ids[: count * length]).view(count, length)
    engine, hf = (_losses(folder, convention, chunks) for convention in CONVENTIONS)
    return Fit((engine, hf), length - 1, len(ids) - count * length)


@torch.no_grad()
def _losses(folder: Path, convention: str, chunks: torch.Tensor) -> np.ndarray:
    """Mean nats of the tokens behind the first, float64 [chunks]."""
    policy = load_policy(folder, decay_layer_index=convention).to_working_dtype(choose_device("auto"))
    return np.array([_loss(policy, chunk.to(policy.device)) for chunk in chunks])


def _loss(policy: Policy, chunk: torch.Tensor) -> float:
    layout = ops.ChunkLayout.build([len(chunk)], policy.config.chunk_size, device=policy.device)
    log_probs, _ = policy.log_probs(policy(chunk, layout)[:-1], chunk[1:], 1.0)
    return -log_probs.double().mean().item()


def _token_ids(folder: Path, text_file: Path) -> list[int]:
    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--compare-decay {text_file}: cannot be read as UTF-8 text: {error}") from error
    ids: list[int] = load_tokenizer(folder)(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _report(fit: Fit, current: str, text_file: Path) -> str:
    lines = [
        f"{text_file}: {len(fit.losses[0])} chunks, {fit.tokens} tokens scored in each"
        + (f"; the last {fit.left_over} tokens fill none and are left out" if fit.left_over else "")
    ]
    for convention, losses in zip(CONVENTIONS, fit.losses, strict=True):
        loss = float(losses.mean())
        lines.append(f"{convention:>6}: perplexity per token {math.exp(loss):.4f} ({loss:.5f} nats)")
    lines.append(f"hf - engine: {fit.difference:+.5f} +- {fit.error:.5f} nats per token (one standard error)")
    if fit.verdict == "undecided":
        lines.append(f"undecided: less than {STANDARD_ERRORS:g} standard errors apart; give a longer text")
    else:
        fits = "which config.json names" if fit.verdict == current else f"but config.json means {current}"
        lines.append(f"{fit.verdict} fits, {fits}: train with policy.decay_layer_index={fit.verdict}")
    return "\n".join(lines)
