"""What is pooled: any partition of the sequences gives the same bits, and shapes that disagree are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rl.metrics.mismatch import mismatch_metrics, mismatch_values
from rl.metrics.pairs import Pairs, exact_sum
from rl.metrics.peers import PEERS, peer_metrics
from tests.rl.metrics.golden import golden, golden_and_masked

NAMES = tuple(PEERS)
FLOATS = st.floats(-30, 0, width=32)


@st.composite
def sequences(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    lengths = draw(st.lists(st.integers(0, 40), min_size=2, max_size=6))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    made = []
    for length in lengths:
        rollout = draw(arrays.arrays(np.float32, length, elements=FLOATS))
        noise = generator.normal(0, 0.1, length).astype(np.float32)
        made.append((rollout + noise, rollout, generator.random(length) < 0.8))
    return made


def of(part: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Pairs:
    train, rollout, masks = ([each[side] for each in part] for side in range(3))
    return Pairs.of(train, rollout, masks)


@settings(max_examples=60, deadline=None)
@given(sequences(), st.randoms(use_true_random=False))
def test_any_partition_in_any_order_gives_the_same_bits(whole: list, random: object) -> None:
    expected = mismatch_metrics(of(whole)) | peer_metrics(of(whole), NAMES)
    shuffled = list(whole)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    cut = random.randint(0, len(whole))  # type: ignore[attr-defined]
    parts = [of(shuffled[:cut]), of(shuffled[cut:])]
    pooled = Pairs.pool(parts)
    found = mismatch_metrics(pooled) | peer_metrics(pooled, NAMES)
    assert found.keys() == expected.keys()
    unequal = {name for name in found if not np.array_equal(found[name], expected[name], equal_nan=True)}
    assert not unequal


def test_naive_sums_would_depend_on_the_order() -> None:
    """What the property above would catch."""
    values = np.array([1e16, 1.0, -1e16, 1.0])
    assert sum(values.tolist()) != sum(values[::-1].tolist())
    assert exact_sum(values) == exact_sum(values[::-1]) == 2.0


def test_masked_tokens_count_nowhere_but_keep_their_place() -> None:
    train, rollout = [np.array([-1.0, -9.0, -2.0])], [np.array([-1.5, -1.0, -2.0])]
    pairs = Pairs.of(train, rollout, [np.array([True, False, True])])
    assert pairs.positions.tolist() == [0, 2] and pairs.lengths.tolist() == [2]
    assert pairs.log_ratio.tolist() == [0.5, 0.0]


def test_a_sequence_without_tokens_changes_no_own_metric() -> None:
    assert mismatch_values(golden_and_masked()) == mismatch_values(golden())


def test_nothing_has_no_metrics() -> None:
    assert mismatch_metrics(Pairs.of([], [])) == peer_metrics(Pairs.of([], []), NAMES) == {}
    empty = Pairs.of([np.zeros(0, np.float32)], [np.zeros(0, np.float32)])
    assert mismatch_metrics(empty) == {}


def test_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence 1: shapes \(3,\), \(2,\), \(3,\) of trainer"):
        Pairs.of([np.zeros(2), np.zeros(3)], [np.zeros(2), np.zeros(2)])
    with pytest.raises(ValueError, match=r"2 sequences of trainer log-probs, 1 of the sampler's and 2 masks"):
        Pairs.of([np.zeros(2), np.zeros(3)], [np.zeros(2)])
