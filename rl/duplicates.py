"""Training problems that repeat one another, or occur in an evaluation set. Exact answers, and seconds for 10^5 rows.

A problem of few words is decided by its numbers: "the remainder when 7*3+5 is divided by 4" and "... 8*3+5 ..." are two
problems. So nothing counts as nearly the same unless its numbers do.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from rl.data_columns import Row, comparable_answer
from rl.problem_text import numbers, windows, words

NEAR_WINDOW = 3
NEAR_SIMILARITY = 0.8  # Jaccard, of the two problems' windows
CONTAINED_SHARE = 0.5  # of the held-out problem's windows
MOST_HOLDERS = 2  # held-out problems that share a window; more make it a phrase


def find_duplicates(rows: Sequence[Row], near: bool) -> dict[int, int]:
    """Row numbers that repeat an earlier row, with the row that stays; in order.

    Equal words make a duplicate. With `near`, so do equal numbers, an equal answer, and runs of three words of which
    four fifths are common to both; a problem with another answer is taken for another question.
    """
    first: dict[tuple[str, ...], int] = {}
    repeats = {}
    for number, row in enumerate(rows):
        earlier = first.setdefault(words(row.problem), number)
        if earlier != number:
            repeats[number] = earlier
    if near:
        for bucket in _buckets(rows, repeats):
            repeats |= _near_duplicates(rows, bucket)
    return dict(sorted(repeats.items()))


def _buckets(rows: Sequence[Row], leave_out: dict[int, int]) -> list[list[int]]:
    """Row numbers by numbers and answer, where more than one row has the same."""
    buckets: dict[object, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if number not in leave_out:
            buckets[numbers(words(row.problem)), comparable_answer(row.answer)].append(number)
    return [bucket for bucket in buckets.values() if len(bucket) > 1]


def _near_duplicates(rows: Sequence[Row], bucket: list[int]) -> dict[int, int]:
    """Compares a row only with those that share one of its first windows in alphabetical order.

    Two sets of similarity s must share one of the first n - ceil(s n) + 1 members, n being the size of either; so
    nothing is missed (prefix filtering, Chaudhuri et al. 2006).
    """
    kept: dict[tuple[str, ...], list[int]] = defaultdict(list)
    repeats = {}
    for number in bucket:
        mine = windows(words(rows[number].problem), NEAR_WINDOW)
        prefix = sorted(mine)[: len(mine) - ceil(NEAR_SIMILARITY * len(mine)) + 1]
        candidates = sorted({other for window in prefix for other in kept[window]})
        same = (other for other in candidates if _similarity(mine, rows[other]) >= NEAR_SIMILARITY)
        earlier = next(same, None)
        if earlier is not None:
            repeats[number] = earlier
            continue
        for window in prefix:
            kept[window].append(number)
    return repeats


def _similarity(mine: set[tuple[str, ...]], other: Row) -> float:
    theirs = windows(words(other.problem), NEAR_WINDOW)
    return len(mine & theirs) / len(mine | theirs)


@dataclass(frozen=True)
class Contamination:
    """A training row in which a held-out problem occurs; `share` of the problem's windows do, 1.0 for all of it."""

    train: Row
    held_out: Row
    share: float

    def __str__(self) -> str:
        return (
            f"{self.train.source}:{self.train.id} holds {self.share:.0%} of {self.held_out.source}:{self.held_out.id}"
        )


def find_contamination(train: Sequence[Row], held_out: Sequence[Row]) -> Iterator[Contamination]:
    """Training rows that hold a held-out problem, in the order of `train`; one of them for each pair.

    A row holds a problem if it is the same in words, or if all of the problem's numbers occur in it and half of the
    problem's runs of 13 words; of 6 words in a problem of fewer than 26, of 3 in one of fewer than 12. Runs that more
    than two held-out problems share are phrases of the trade ("relatively prime positive integers") and do not count.
    A problem of fewer than 6 words must be the row's own, and one that the held-out set repeats is looked for once.
    """
    index = _HeldOut(held_out)
    for row in train:
        for number, share in index.found_in(row):
            yield Contamination(row, held_out[number], share)


def contamination_report(hits: Sequence[Contamination], shown: int = 3) -> str:
    """How many problems are concerned, and the first hits."""
    train, held_out = {hit.train for hit in hits}, {hit.held_out for hit in hits}
    lines = [f"{len(train)} training problems hold {len(held_out)} of the evaluation problems"]
    lines += [f"  {hit}: {hit.held_out.problem[:100]!r}" for hit in hits[:shown]]
    return "\n".join([*lines, f"  and {len(hits) - shown} more"] if len(hits) > shown else lines)


def window_length(num_words: int) -> int | None:
    """Words of a window that is telling in a problem of this length; None where only the whole problem is."""
    return next((length for least, length in ((26, 13), (12, 6), (6, 3)) if num_words >= least), None)


class _HeldOut:
    """Where each held-out problem is, by its words and by its windows, which are kept by length."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._same: dict[tuple[str, ...], int] = {}
        for number, row in enumerate(rows):
            self._same.setdefault(words(row.problem), number)
        self._numbers = {number: Counter(numbers(each)) for each, number in self._same.items()}
        self._holders: dict[int, dict[tuple[str, ...], list[int]]] = {}
        for problem_words, number in self._same.items():
            length = window_length(len(problem_words))
            if length is not None:
                holders = self._holders.setdefault(length, defaultdict(list))
                for window in windows(problem_words, length):
                    holders[window].append(number)
        self._holders = {length: _without_phrases(holders) for length, holders in self._holders.items()}
        self._sizes = Counter(
            number for holders in self._holders.values() for held in holders.values() for number in held
        )

    def found_in(self, row: Row) -> list[tuple[int, float]]:
        """Held-out problems that `row` holds, with the share that it holds."""
        row_words = words(row.problem)
        row_numbers = Counter(numbers(row_words))
        shared: Counter[int] = Counter()
        for length, holders in self._holders.items():
            for window in windows(row_words, length):
                shared.update(holders.get(window, ()))
        shares = {number: count / self._sizes[number] for number, count in shared.items()}
        held = {
            number: share
            for number, share in shares.items()
            if share >= CONTAINED_SHARE and self._numbers[number] <= row_numbers
        }
        if row_words in self._same:
            held[self._same[row_words]] = 1.0
        return sorted(held.items())


def _without_phrases(holders: dict[tuple[str, ...], list[int]]) -> dict[tuple[str, ...], list[int]]:
    return {window: held for window, held in holders.items() if len(held) <= MOST_HOLDERS}
