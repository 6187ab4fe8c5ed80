"""Completions by the hundred thousand through one worker: no hang, no crash, no growth, nothing touched."""

import os
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from reward.config import RewardConfig
from reward.pool import RewardPool

from .fuzz import completions

TIMEOUT_SECONDS = 1.0
BATCH = 1000
MIB = 1 << 20
# How late a busy machine may notice that a limit is past.
PATIENCE_MILLISECONDS = 10_000
VERDICTS = {"correct", "wrong", "wrong_form", "no_answer", "unparsable_answer"}


def resident(pid: int | str = "self") -> int:
    """Bytes of memory that the process holds now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


class Watch:
    """Scores batches through a pool of one worker, and keeps what each left behind."""

    def __init__(self, pool: RewardPool) -> None:
        self.pool = pool
        self.others = children()
        self.reasons: Counter[str] = Counter()
        self.slowest_milliseconds = 0.0
        self.parent_bytes: list[int] = []
        self.worker_bytes: list[int] = []

    def score(self, items: list[tuple[str, str]]) -> None:
        results = self.pool.score(items)
        assert len(results) == len(items)
        assert all(result.score == float(result.reason == "correct") for result in results)
        self.reasons.update(str(result.reason) for result in results)
        self.slowest_milliseconds = max(self.slowest_milliseconds, *(result.milliseconds for result in results))
        workers = [worker.process.pid for team in self.pool._teams.values() for worker in team]
        assert len(workers) <= 1 and children() <= self.others | set(workers)
        self.parent_bytes.append(resident())
        self.worker_bytes += [resident(pid) for pid in workers]


def fuzz(seed: int, count: int) -> Watch:
    """Through one worker, from a folder that must stay empty."""
    stream, before = completions(seed, count), children()
    with RewardPool(RewardConfig(timeout_seconds=TIMEOUT_SECONDS)) as pool:
        watch = Watch(pool)
        while batch := list(islice(stream, BATCH)):
            watch.score(batch)
    assert children() == before
    assert os.listdir() == []
    assert watch.reasons.total() == count
    assert set(watch.reasons) <= VERDICTS | {"timeout"}
    assert watch.slowest_milliseconds < TIMEOUT_SECONDS * 1000 + PATIENCE_MILLISECONDS
    return watch


def test_a_few_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fuzz(seed=1, count=1000)


@pytest.mark.slow
def test_a_hundred_thousand_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_before = descriptors()
    watch = fuzz(seed=0, count=100_000)
    assert descriptors() == open_before
    assert set(watch.reasons) == VERDICTS | {"timeout"}
    assert watch.reasons["timeout"] <= 20  # the bombs, and few besides
    warm = max(watch.parent_bytes[:20])
    assert max(watch.parent_bytes[20:]) < warm + 32 * MIB
    assert max(watch.worker_bytes) < 256 * MIB
