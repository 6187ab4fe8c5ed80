"""Batches come in order, none is begun too early, and an error of the sampling thread ends the run."""

import threading

import pytest

from rl.sampling_ahead import SamplingAhead

PATIENCE_SECONDS = 20.0


def test_synchronous_batches_are_made_when_taken() -> None:
    made: list[tuple[int, str]] = []
    batches = SamplingAhead(lambda step: made.append((step, threading.current_thread().name)), last=5, max_staleness=0)
    for step in (3, 4, 5):
        batches.take(step)
        assert made[-1] == (step, threading.current_thread().name)
    assert [step for step, _ in made] == [3, 4, 5]


@pytest.mark.parametrize("max_staleness", [1, 2, 3])
def test_as_many_batches_are_made_ahead_as_the_bound_allows(max_staleness: int) -> None:
    made: list[int] = []
    arrived = threading.Condition()

    def sample(step: int) -> int:
        with arrived:
            made.append(step)
            arrived.notify_all()
        return 10 * step

    batches = SamplingAhead(sample, last=6, max_staleness=max_staleness)
    for step in range(1, 7):
        assert batches.take(step) == 10 * step
        expected = list(range(1, min(step + max_staleness, 6) + 1))
        with arrived:
            assert arrived.wait_for(lambda want=expected: made == want, PATIENCE_SECONDS), (made, expected)


def test_the_next_batch_is_made_while_the_step_trains() -> None:
    begun, go = threading.Event(), threading.Event()

    def sample(step: int) -> int:
        if step == 2:
            begun.set()
            assert go.wait(PATIENCE_SECONDS)
        return step

    batches = SamplingAhead(sample, last=2, max_staleness=1)
    assert batches.take(1) == 1
    assert begun.wait(PATIENCE_SECONDS)  # the step is "training" here, and nobody has asked for batch 2
    go.set()
    assert batches.take(2) == 2


def test_what_sampling_raised_is_raised_where_the_batch_is_taken() -> None:
    def sample(step: int) -> int:
        if step == 2:
            raise FloatingPointError("reward worker is gone")
        return step

    batches = SamplingAhead(sample, last=3, max_staleness=1)
    assert batches.take(1) == 1
    with pytest.raises(FloatingPointError, match="reward worker is gone"):
        batches.take(2)
