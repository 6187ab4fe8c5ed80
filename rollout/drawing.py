"""The next tokens: drawn for every row that asks, checked against drafts, recorded, and judged for an end."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import ops
from policy.transformer import Policy
from rollout.running import NEVER, Running


@dataclass(frozen=True)
class Rows:
    """The rows of a step that draw: of each slot the one behind its last token, and those behind its drafts."""

    slots: np.ndarray  # [S]
    counts: np.ndarray  # [S]
    sequence: np.ndarray  # [R] index into slots
    offset: np.ndarray  # [R] place behind the slot's last token

    @classmethod
    def of(cls, slots: np.ndarray, counts: np.ndarray) -> "Rows":
        sequence = np.repeat(np.arange(len(slots)), counts)
        return cls(slots, counts, sequence, np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts))


def draw_and_record(
    policy: Policy, running: Running, rows: Rows, hidden: Tensor, policy_version: int
) -> list[tuple[int, str]]:
    """hidden FP32 [R, D]. Returns the slots that ended, and why: "stop" or "length"."""
    row_slots = rows.slots[rows.sequence]
    positions = running.length[row_slots] + rows.offset
    drawn = _draw(policy, running, row_slots, positions, hidden)
    tokens, log_probs, processed = (values.cpu().numpy() for values in (drawn[0], drawn[1], drawn[3]))
    kept, stopped = _accepted(running, rows, tokens)
    if running.watched:
        _watch(running, rows, tokens, drawn[2], kept, stopped)
    recorded = rows.offset < kept[rows.sequence]
    at = row_slots[recorded], positions[recorded]
    running.tokens[at], running.log_probs[at] = tokens[recorded], log_probs[recorded]
    running.processed[at], running.versions[at] = processed[recorded], policy_version
    running.length[rows.slots] += kept
    running.computed[rows.slots] = running.length[rows.slots] - 1
    ended = stopped | (running.length[rows.slots] == running.max_length[rows.slots])
    return [(int(rows.slots[i]), "stop" if stopped[i] else "length") for i in np.flatnonzero(ended)]


def _draw(
    policy: Policy, running: Running, slots: np.ndarray, positions: np.ndarray, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def setting(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values[slots]).to(hidden.device)

    too_early = positions < running.min_length[slots]
    banned = None
    if too_early.any():
        banned = torch.from_numpy(np.where(too_early[:, None], running.stop_ids[slots], NEVER)).to(hidden.device)
    return ops.sample(
        hidden,
        policy.lm_head,
        setting(running.temperature),
        setting(running.top_p),
        setting(running.top_k),
        setting(running.min_p),
        torch.from_numpy(running.uniforms(slots, positions)).to(hidden.device),
        policy.dtype,
        banned,
        policy.packed_head(),
        whole=bool(running.watched),
    )


def _accepted(running: Running, rows: Rows, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens each slot takes, int64 [S]: as far as its drafts are what was drawn, and no further than a stop
    token; and whether it took one, bool [S]."""
    if len(tokens) == len(rows.slots):
        return np.ones_like(rows.slots), running.stops_at(rows.slots, tokens)
    width = int(rows.counts.max())
    place = np.arange(width)
    drawn = np.full((len(rows.slots), width), NEVER)
    drawn[rows.sequence, rows.offset] = tokens
    at = np.minimum(running.length[rows.slots][:, None] + place[:-1], running.tokens.shape[1] - 1)
    drafted = running.tokens[rows.slots[:, None], at]
    right = (drawn[:, :-1] == drafted) & (place[:-1] < rows.counts[:, None] - 1)
    kept = 1 + np.cumprod(right, axis=1).sum(1)
    stops = running.stops_at(rows.slots, drawn) & (place < kept[:, None])
    stopped: np.ndarray = stops.any(1)
    return np.where(stopped, stops.argmax(1) + 1, kept), stopped


def _watch(
    running: Running, rows: Rows, tokens: np.ndarray, log_probs: Tensor, kept: np.ndarray, stopped: np.ndarray
) -> None:
    """What single sequences ask for besides: an end at a string, which may cut `kept`, and log-probs of more tokens."""
    begins = np.cumsum(rows.counts) - rows.counts
    for index in np.flatnonzero(np.isin(rows.slots, list(running.watched))).tolist():
        slot, begin = int(rows.slots[index]), int(begins[index])
        sequence = running.sequence[slot]
        assert sequence is not None
        if sequence.stop_strings:
            for place in range(int(kept[index])):
                found = sequence.stop_strings.completes(int(tokens[begin + place]))
                if found and running.length[slot] + place >= running.min_length[slot]:
                    kept[index], stopped[index] = place + 1, True
                    break
        new = log_probs[begin : begin + int(kept[index])]
        if sequence.keeps_full_rows:
            sequence.full_rows += list(new.cpu().numpy().copy())
        if count := sequence.request.sampling.top_log_probs:
            ids, values = ops.most_likely(new, count)
            sequence.top += list(zip(ids.cpu().numpy(), values.cpu().numpy(), strict=True))
