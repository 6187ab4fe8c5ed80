"""Which sequences share a micro-batch.

First-fit decreasing: longest first, each into the first micro-batch that still has room. Next-fit keeps the order
but leaves up to half of the budget empty; first-fit decreasing never needs more than 11/9 of the fewest possible
micro-batches (plus one). It reads nothing but the lengths, so gradients are summed in the same order in every run.
"""

from collections.abc import Sequence


def pack_under_budget(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Micro-batches as lists of indices into `lengths`, ascending; each holds at most `token_budget` tokens.

    A sequence longer than the budget gets a micro-batch of its own. Equal lengths keep their order.
    """
    micro_batches: list[list[int]] = []
    tokens: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        home = next((home for home, used in enumerate(tokens) if used + length <= token_budget), None)
        if home is None:
            micro_batches.append([index])
            tokens.append(length)
        else:
            micro_batches[home].append(index)
            tokens[home] += length
    return [sorted(micro_batch) for micro_batch in micro_batches]
