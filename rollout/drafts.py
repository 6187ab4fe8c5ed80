"""Drafts by lookup: what followed the last tokens when they last occurred in the same sequence.

The drafts are verified in the step that computes the last token, as further rows of the same sequence. Draws are
addressed (design A8), so a draft is right when the token drawn at its place is that draft, and tokens and log-probs are
those that one step after another gives, bit for bit. Drafts stay inside the open chunk and never fill it: only a full
chunk changes a state (A3), so what a wrong draft leaves in the cache is overwritten before it is read.
"""

import numpy as np

from rollout.running import Running

LONGEST_MATCH = 3  # tokens looked up; where they never occurred before, fewer
WINDOW = 2048  # last tokens of a sequence that are searched


def draft(running: Running, slots: np.ndarray, most: int, chunk_size: int) -> np.ndarray:
    """Writes up to `most` drafts behind the tokens of each slot that has drawn some; returns how many, int64 [S]."""
    length = running.length[slots]
    room = np.minimum(chunk_size - 1 - length % chunk_size, running.max_length[slots] - length - 1)
    has_room = (length % chunk_size > 0) & (length > running.prompt_length[slots])
    room = np.where(has_room, np.clip(room, 0, most), 0)
    first = max(0, int(length.max()) - WINDOW)
    follows = _last_occurrence(running.tokens[slots, first : int(length.max())], length - first)
    counts = np.where(follows > 0, np.minimum(room, length - first - follows), 0)
    for place in range(int(counts.max(initial=0))):
        drafted = slots[counts > place]
        at = (first + follows + place)[counts > place]
        running.tokens[drafted, length[counts > place] + place] = running.tokens[drafted, at]
    return counts


def _last_occurrence(tokens: np.ndarray, length: np.ndarray) -> np.ndarray:
    """tokens [S, L], of which `length` [S] count -> place behind the last occurrence of the longest match, or 0."""
    place = np.arange(tokens.shape[1])
    same = place < length[:, None] - 1
    matched = np.zeros(tokens.shape, dtype=np.int8)
    for back in range(LONGEST_MATCH):
        last = np.take_along_axis(tokens, np.maximum(length - 1 - back, 0)[:, None], 1)
        earlier = np.roll(tokens, back, axis=1)
        same = same & (earlier == last) & (place >= back) & (length[:, None] > back)
        matched += same
    best = tokens.shape[1] - 1 - matched[:, ::-1].argmax(1)
    return np.where(matched.any(1), best + 1, 0)
