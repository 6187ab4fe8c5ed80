"""Which problems are asked when: a function of the recipe, the step and a cursor, the number of batches drawn before.

Every source has its share of the places in the endless row of prompts, by a fixed pattern. Its own places it fills
epoch by epoch, each a permutation of its rows. With curriculum stages, the rows of a source are split by pass rate, and
a stage of the run fills its places from one part only.
"""

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Self

from rl.config import Recipe
from rl.data import source_of
from rl.data_columns import Row
from rl.data_filters import measured_pass_rate


@dataclass(frozen=True)
class Shares:
    """Which source, 0, 1, ..., every place belongs to: a pattern that repeats."""

    pattern: tuple[int, ...]

    @classmethod
    def of(cls, weights: Sequence[float]) -> Self:
        """Spreads every source evenly: at each place the one that is furthest behind its share, the first of equals."""
        thousandths = [round(weight * 1000) for weight in weights]
        parts = [weight // math.gcd(*thousandths) for weight in thousandths]
        behind, pattern = [0] * len(parts), list[int]()
        for _ in range(sum(parts)):
            behind = [late + part for late, part in zip(behind, parts, strict=True)]
            pattern.append(behind.index(max(behind)))
            behind[pattern[-1]] -= sum(parts)
        return cls(tuple(pattern))

    @cached_property
    def _places(self) -> tuple[list[int], ...]:
        """The places of every source within one period."""
        return tuple(
            [place for place, each in enumerate(self.pattern) if each == source]
            for source in range(max(self.pattern) + 1)
        )

    def sources(self, start: int, stop: int) -> list[int]:
        """The sources of the places from `start` up to `stop`."""
        return [self.pattern[place % len(self.pattern)] for place in range(start, stop)]

    def count(self, source: int, place: int) -> int:
        """How many places before `place` are the source's."""
        mine = self._places[source]
        periods, rest = divmod(place, len(self.pattern))
        return periods * len(mine) + bisect_left(mine, rest)

    def place(self, source: int, nth: int) -> int:
        """The `nth` place, from 0, that is the source's."""
        mine = self._places[source]
        periods, rest = divmod(nth, len(mine))
        return periods * len(self.pattern) + mine[rest]


@dataclass(frozen=True)
class Epochs:
    """The rows of one source in one stage, an endless row of permutations; a batch takes the next of them.

    `rows` are numbers in the data set; `name` makes the permutations this one's own. Batch b takes the places of
    `source` from `batch_size * b` up to the next batch's.
    """

    rows: tuple[int, ...]
    name: str
    shares: Shares
    source: int
    batch_size: int

    def batch(self, batch: int) -> list[int]:
        """Row numbers of a batch. None occurs twice unless the batch takes more rows than there are."""
        start, stop = self._span(batch)
        taken: list[int] = []
        while start < stop:
            epoch, first = divmod(start, len(self.rows))
            taken += self._epoch(epoch)[first : first + stop - start]
            start = min(stop, (epoch + 1) * len(self.rows))
        return taken

    def _span(self, batch: int) -> tuple[int, int]:
        """First and last + 1 of the places in this row that a batch takes."""
        start, stop = (self.shares.count(self.source, place * self.batch_size) for place in (batch, batch + 1))
        return start, stop

    def _epoch(self, epoch: int) -> list[int]:
        """The permutation of an epoch, in which rows already asked in the batch that opens it wait for a later one.

        To know those rows takes the end of the epoch before, and so on back to an epoch that opens a batch, or whose
        end is as it was shuffled: an epoch changes only where its first batch is.
        """
        first = epoch
        while first > 0 and self._waits(first):
            first -= 1
            if self._waits(first + 1) + self._opening_size(first) <= len(self.rows):
                break
        order = self._shuffled(first)
        for later in range(first + 1, epoch + 1):
            asked = set(order[len(order) - self._waits(later) :])
            order, size = self._shuffled(later), self._opening_size(later)
            order[:size] = sorted(order[:size], key=asked.__contains__)
        return order

    def _opening_batch(self, epoch: int) -> int:
        return self.shares.place(self.source, epoch * len(self.rows)) // self.batch_size

    def _opening_size(self, epoch: int) -> int:
        start, stop = self._span(self._opening_batch(epoch))
        return stop - start

    def _waits(self, epoch: int) -> int:
        """How many rows must wait: those the opening batch took from the epoch before; 0 where none can."""
        start, stop = self._span(self._opening_batch(epoch))
        return epoch * len(self.rows) - start if stop - start <= len(self.rows) else 0

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(self.rows)
        random.Random(f"lockstep prompt order {self.name} {epoch}").shuffle(order)
        return order


@dataclass(frozen=True)
class PromptOrder:
    """The problems of every step: for every stage of the run, the `Epochs` of every source."""

    stages: tuple[tuple[Epochs, ...], ...]
    shares: Shares
    batch_size: int
    steps: int

    @classmethod
    def of(cls, rows: Sequence[Row], recipe: Recipe) -> Self:
        """Raises ValueError where curriculum stages need a pass rate that a row lacks, or more rows or steps."""
        data, loop = recipe.data, recipe.loop
        if data.curriculum_stages > loop.steps:
            raise ValueError(
                f"data.curriculum_stages = {data.curriculum_stages} exceeds loop.steps = {loop.steps}; lower it"
            )
        shares = Shares.of([each.weight for each in data.train])
        sources = []
        for number, source in enumerate(data.train):
            mine = [index for index, row in enumerate(rows) if source_of(row) == source.source]
            parts = enumerate(_by_difficulty(rows, mine, data.curriculum_stages))
            sources.append(
                [
                    Epochs(part, _name(recipe.seed, number, stage), shares, number, loop.prompts_per_step)
                    for stage, part in parts
                ]
            )
        return cls(tuple(zip(*sources, strict=True)), shares, loop.prompts_per_step, loop.steps)

    def batch(self, step: int, cursor: int) -> list[int]:
        """Row numbers of the batch that a step, counted from 0, draws after `cursor` earlier batches of the run.

        A stage of the curriculum counts batches from its own first step on.
        """
        assert 0 <= step <= cursor and step < self.steps
        stage = step * len(self.stages) // self.steps
        batch = cursor - math.ceil(stage * self.steps / len(self.stages))
        taken = [iter(epochs.batch(batch)) for epochs in self.stages[stage]]
        return [
            next(taken[source])
            for source in self.shares.sources(batch * self.batch_size, (batch + 1) * self.batch_size)
        ]


def _name(seed: int, source: int, stage: int) -> str:
    """What tells the permutations of one source and stage from another's; the first have the seed alone."""
    return " ".join([str(seed), *([f"source {source}"] if source else []), *([f"stage {stage}"] if stage else [])])


def _by_difficulty(rows: Sequence[Row], mine: list[int], stages: int) -> list[tuple[int, ...]]:
    """Row numbers in equal parts, the most often solved rows first; rows of one pass rate keep their order."""
    if stages == 1:
        return [tuple(mine)]
    if len(mine) < stages:
        raise ValueError(
            f"{source_of(rows[mine[0]])}: data.curriculum_stages = {stages} needs as many problems, got {len(mine)}"
        )
    sorted_rows = sorted(mine, key=lambda row: -measured_pass_rate(rows[row], "data.curriculum_stages"))
    bounds = [len(mine) * stage // stages for stage in range(stages + 1)]
    return [tuple(sorted_rows[start:stop]) for start, stop in pairwise(bounds)]
