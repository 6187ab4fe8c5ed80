"""Who is asked when: epochs, shares of sources, curriculum, and that all of it needs no history."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.data_columns import Row
from rl.prompt_order import Epochs, PromptOrder, Shares
from tests.rl.tiny import tiny_recipe

ALONE = Shares.of([1.0])


def _taken(num_rows: int, batch_size: int, batches: int, seed: int = 0, shares: Shares = ALONE) -> list[list[int]]:
    epochs = Epochs(tuple(range(num_rows)), str(seed), shares, 0, batch_size)
    return [epochs.batch(number) for number in range(batches)]


def test_order_is_what_it_always_was() -> None:
    """A run that was started earlier must go on with the same problems. Two of 10 rows wait in the third batch."""
    assert _taken(10, 4, 6) == [[7, 0, 6, 3], [1, 5, 4, 8], [9, 2, 6, 1], [4, 2, 8, 0], [9, 5, 3, 7], [2, 4, 0, 5]]
    assert _taken(3, 5, 4) == [[1, 2, 0, 2, 0], [1, 1, 2, 0, 1], [0, 2, 1, 2, 0], [1, 2, 0, 0, 1]]
    assert _taken(1600, 64, 40)[39][:8] == [848, 499, 1217, 1278, 794, 1119, 1480, 418]


@given(num_rows=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 9))
def test_order_covers_every_epoch_without_duplicates_in_a_batch(num_rows: int, batch_size: int, seed: int) -> None:
    batches = _taken(num_rows, batch_size, batches=12, seed=seed)
    assert {len(batch) for batch in batches} == {batch_size}
    _check_epochs(num_rows, batches)


def _check_epochs(num_rows: int, batches: list[list[int]]) -> None:
    assert all(len(set(batch)) == len(batch) for batch in batches if len(batch) <= num_rows)
    taken = [row for batch in batches for row in batch]
    for start in range(0, len(taken) - num_rows + 1, num_rows):
        assert sorted(taken[start : start + num_rows]) == list(range(num_rows))


@given(
    num_rows=st.integers(1, 12),
    batch_size=st.integers(1, 16),
    weights=st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0, 7.0]), min_size=2, max_size=4),
)
def test_a_source_keeps_its_epochs_in_a_mixture(num_rows: int, batch_size: int, weights: list[float]) -> None:
    _check_epochs(num_rows, _taken(num_rows, batch_size, 40, shares=Shares.of(weights)))


def test_order_needs_no_history() -> None:
    for num_rows in (50, 100):
        epochs = Epochs(tuple(range(num_rows)), "1", ALONE, 0, 32)
        assert epochs.batch(1000) == _taken(num_rows, 32, 1001, seed=1)[1000]


def test_order_differs_by_seed_and_epoch() -> None:
    first, second = _taken(32, 32, 2)
    assert first != second and first != list(range(32))
    assert first != _taken(32, 32, 1, seed=1)[0]


def test_order_repair_leaves_a_fair_mix() -> None:
    """Row 0 of 5 rows in steps of 3 is asked as often as any other, and comes in every place of a step."""
    batches = _taken(5, 3, 1000)
    assert Counter(row for batch in batches for row in batch) == dict.fromkeys(range(5), 600)
    assert all(abs(count - 200) < 60 for count in Counter(batch.index(0) for batch in batches if 0 in batch).values())


@pytest.mark.parametrize(
    ("weights", "pattern"),
    [
        ([5.0], (0,)),
        ([1.0, 1.0], (0, 1)),
        ([3.0, 1.0], (0, 0, 1, 0)),
        ([0.2, 0.3], (1, 0, 1, 0, 1)),
        ([1.0, 2.0, 5.0], (2, 1, 2, 0, 2, 2, 1, 2)),
    ],
)
def test_pattern_by_hand(weights: list[float], pattern: tuple[int, ...]) -> None:
    assert Shares.of(weights).pattern == pattern


@given(st.lists(st.sampled_from([0.001, 0.25, 0.333, 1.0, 3.0]), min_size=1, max_size=4), st.integers(0, 5000))
def test_every_stretch_holds_every_share(weights: list[float], length: int) -> None:
    shares = Shares.of(weights)
    for source, weight in enumerate(weights):
        count = shares.count(source, length)
        assert abs(count - length * weight / sum(weights)) < len(weights)
        assert count == shares.sources(0, length).count(source)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 200))
def test_place_is_the_inverse_of_count(weights: list[float], nth: int) -> None:
    shares = Shares.of(weights)
    for source in range(len(weights)):
        place = shares.place(source, nth)
        assert shares.count(source, place) == nth and shares.sources(place, place + 1) == [source]


def _rows(source: str, pass_rates: list[float | None]) -> list[Row]:
    return [Row(str(number), "P", "1", source, pass_rate=rate) for number, rate in enumerate(pass_rates)]


def test_sources_are_asked_by_weight(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "data.train=[{source: a, weight: 3}, b]", "loop.steps=30")
    rows = [*_rows("a", [None] * 7), *_rows("b", [None] * 5)]
    order = PromptOrder.of(rows, recipe)
    batches = [order.batch(step, step) for step in range(30)]
    assert all([rows[row].source for row in batch] == ["a", "a", "b", "a"] for batch in batches)
    counts = Counter(row for batch in batches for row in batch)
    assert [counts[row] for row in range(7, 12)] == [6] * 5
    assert {counts[row] for row in range(7)} == {12, 13}


def test_all_synthetic_families_are_one_source(tmp_path: Path) -> None:
    rows = [*_rows("synthetic/remainder", [None] * 2), *_rows("synthetic/counting", [None] * 2)]
    assert sorted(PromptOrder.of(rows, tiny_recipe(tmp_path)).batch(0, 0)) == [0, 1, 2, 3]


# Hardest first in the file; 4 stages of 2 rows in 8 steps of 4 prompts.
RATES = [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]
CURRICULUM = ("data.train=a", "data.curriculum_stages=4", "loop.steps=8", "loop.prompts_per_step=2")


def test_curriculum_goes_from_easy_to_hard(tmp_path: Path) -> None:
    order = PromptOrder.of(_rows("a", list(RATES)), tiny_recipe(tmp_path, *CURRICULUM))
    asked = [sorted(order.batch(step, step)) for step in range(8)]
    assert asked == [[6, 7], [6, 7], [4, 5], [4, 5], [2, 3], [2, 3], [0, 1], [0, 1]]


def test_curriculum_follows_the_step_and_not_the_cursor(tmp_path: Path) -> None:
    """Dynamic sampling has drawn more batches than steps."""
    order = PromptOrder.of(_rows("a", list(RATES)), tiny_recipe(tmp_path, *CURRICULUM))
    assert sorted(order.batch(3, cursor=9)) == [4, 5]
    assert order.batch(7, cursor=29) == order.batch(7, cursor=29)


def test_curriculum_stages_that_do_not_divide(tmp_path: Path) -> None:
    overrides = ("data.train=a", "data.curriculum_stages=3", "loop.steps=4", "loop.prompts_per_step=2")
    order = PromptOrder.of(_rows("a", list(RATES)), tiny_recipe(tmp_path, *overrides))
    assert [[len(epochs.rows) for epochs in stage] for stage in order.stages] == [[2], [3], [3]]
    assert [set(order.batch(step, step)) <= {5, 6, 7} for step in range(4)] == [True, True, False, False]


def test_every_stage_starts_with_an_epoch(tmp_path: Path) -> None:
    """Stages of 4 and 3 steps, of 6 rows each: the second asks every row of its own once."""
    overrides = ("data.train=a", "data.curriculum_stages=2", "loop.steps=7", "loop.prompts_per_step=2")
    order = PromptOrder.of(_rows("a", [number / 11 for number in range(12)]), tiny_recipe(tmp_path, *overrides))
    assert sorted(row for step in (4, 5, 6) for row in order.batch(step, step)) == [0, 1, 2, 3, 4, 5]


def test_rows_of_one_pass_rate_keep_their_order(tmp_path: Path) -> None:
    order = PromptOrder.of(_rows("a", [0.5] * 8), tiny_recipe(tmp_path, *CURRICULUM))
    assert [stage[0].rows for stage in order.stages] == [(0, 1), (2, 3), (4, 5), (6, 7)]


@pytest.mark.parametrize(
    ("rates", "override", "message"),
    [
        ([0.5] * 7 + [None], (), r"a: row 7 has no pass_rate, which data\.curriculum_stages needs"),
        ([0.5] * 3, (), "a: data.curriculum_stages = 4 needs as many problems, got 3"),
        ([0.5] * 8, ("loop.steps=3",), r"data\.curriculum_stages = 4 exceeds loop\.steps = 3; lower it"),
    ],
)
def test_curriculum_that_cannot_be(
    rates: list[float | None], override: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    overrides = [each for each in CURRICULUM if not override or not each.startswith("loop.steps")]
    with pytest.raises(ValueError, match=message):
        PromptOrder.of(_rows("a", rates), tiny_recipe(tmp_path, *overrides, *override))
