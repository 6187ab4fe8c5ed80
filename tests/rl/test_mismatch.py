"""The comparison of log-probs: what counts as unequal, where the first one is, which sequences are looked at whole."""

import numpy as np
import pytest

from rl.mismatch import Comparison, Sampled, full_vocab_choice

FIRST, SECOND = Sampled("row-4", 1), Sampled("row-9", 0)
ENGINE = np.array([-0.5, -1.5, -2.0], dtype=np.float32)


def test_equal_bits_are_exact() -> None:
    comparison = Comparison(step=3)
    comparison.add(FIRST, ENGINE.copy(), ENGINE)
    assert comparison.is_exact and comparison.first is None
    assert comparison.metrics() == {
        "mismatch/tokens_compared": 3,
        "mismatch/tokens_unequal": 0,
        "mismatch/full_vocab_rows": 0,
        "mismatch/full_vocab_unequal": 0,
    }


def test_one_unit_in_the_last_place_is_unequal() -> None:
    comparison, trainer = Comparison(step=3), ENGINE.copy()
    trainer[1] = np.nextafter(trainer[1], np.float32(0))
    comparison.add(FIRST, trainer, ENGINE)
    assert not comparison.is_exact
    assert comparison.tokens_unequal == 1


def test_message_names_the_first_unequal_token_and_counts_all() -> None:
    comparison = Comparison(step=3)
    comparison.add(SECOND, ENGINE, ENGINE)
    comparison.add(FIRST, np.array([-0.5, -1.0, -2.5], dtype=np.float32), ENGINE)
    comparison.add(SECOND, np.array([-9.0, -1.5, -2.0], dtype=np.float32), ENGINE)
    assert comparison.message() == (
        "trainer and engine disagree on 3 of 9 sampled tokens and 0 entries of 0 full-vocabulary rows; first at "
        "step 3, prompt row-4, sample 1, completion token 1: trainer -1.0, engine -1.5"
    )


def test_nan_equals_nothing() -> None:
    comparison, both = Comparison(step=1), np.array([np.nan], dtype=np.float32)
    comparison.add(FIRST, both, both)
    assert comparison.tokens_unequal == 1
    assert comparison.first is not None and "completion token 0: trainer nan, engine nan" in comparison.first


def test_a_full_vocabulary_row_counts_every_entry() -> None:
    comparison = Comparison(step=2)
    engine = np.zeros((2, 4), dtype=np.float32)
    trainer = engine.copy()
    trainer[1, 2:] = [-1.0, np.nan]
    comparison.add_full_vocab(SECOND, trainer, engine)
    assert not comparison.is_exact
    assert (comparison.full_vocab_rows, comparison.full_vocab_unequal, comparison.tokens_compared) == (2, 2, 0)
    assert comparison.first == (
        "step 2, prompt row-9, sample 0, completion token 1, vocabulary entry 2: trainer -1.0, engine 0.0"
    )


PAIRS = [(prompt, sample) for prompt in range(8) for sample in range(4)]


def test_choice_follows_seed_and_step_only() -> None:
    """Pinned: a resumed run must look at the same sequences as one that never stopped."""
    chosen = full_vocab_choice(0, 1, PAIRS, 3)
    assert chosen == full_vocab_choice(0, 1, PAIRS, 3) == {2: (1,), 6: (1,), 7: (1,)}
    assert chosen != full_vocab_choice(0, 2, PAIRS, 3) and chosen != full_vocab_choice(1, 1, PAIRS, 3)


@pytest.mark.parametrize(("count", "found"), [(0, 0), (1, 1), (5, 5), (32, 32), (100, 32)])
def test_choice_has_as_many_distinct_sequences_as_asked(count: int, found: int) -> None:
    chosen = full_vocab_choice(7, 3, PAIRS, count)
    pairs = [(prompt, sample) for prompt, samples in chosen.items() for sample in samples]
    assert len(pairs) == len(set(pairs) & set(PAIRS)) == found
    assert pairs == sorted(pairs)
