"""Compiled CPU kernels: what they compute with, how threads share their items, and what happens without Numba."""

import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ops import compiled
from ops.compiled import add_weighted, array, exp, number, panels_of, plain, score_keys, share, sigmoid


@compiled.compiled
def _exp_kernel(begin, end, x, y):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        y[i] = exp(x[i])


@compiled.compiled
def _sigmoid_kernel(begin, end, x, y):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        y[i] = sigmoid(x[i])


@compiled.compiled
def _count_kernel(begin, end, visits):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        visits[i] += 1


@compiled.compiled
def _mark_kernel(begin, end, ends):  # type: ignore[no-untyped-def]
    ends[begin] = end


@compiled.compiled
def _read_kernel(begin, end, x, y):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        y[i] = number(x[i])


@compiled.compiled
def _weighted_kernel(begin, end, weights, rows, out):  # type: ignore[no-untyped-def]
    add_weighted(len(weights), weights, 0, rows, weights.shape[1], out)


@compiled.compiled
def _score_kernel(begin, end, query, keys, scores):  # type: ignore[no-untyped-def]
    score_keys(len(query), query, keys, end, scores, 0)


def of_all(kernel: object, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    share(kernel, len(x), 0, x, y)
    return y


def test_exp_is_within_one_and_a_half_units_in_the_last_place() -> None:
    x = torch.linspace(-87.3, 88.0, 1_000_003)
    exact = x.double().exp()
    assert ((of_all(_exp_kernel, x) - exact).abs() / exact).max() < 1.5 * 2.0**-23


def test_exp_at_its_ends() -> None:
    x = torch.tensor([0.0, -0.0, -87.4, -1e30, -math.inf, 88.1, math.inf, math.nan])
    got = of_all(_exp_kernel, x)
    assert got[:7].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, math.inf, math.inf] and bool(got[7].isnan())


def test_sigmoid() -> None:
    """1 + exp(-x), the quotient and exp(-x) are each rounded: 3 units at most."""
    x = torch.linspace(-80.0, 80.0, 100_001)
    exact = torch.sigmoid(x.double())
    assert ((of_all(_sigmoid_kernel, x) - exact).abs() / exact).max() < 3 * 2.0**-23
    assert of_all(_sigmoid_kernel, torch.tensor([-200.0, 0.0, 200.0])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("kernel", [_exp_kernel, _sigmoid_kernel])
def test_bits_do_not_depend_on_the_place_in_a_vector(kernel: object) -> None:
    x = 10 * torch.randn(131)
    together = of_all(kernel, x)
    for begin in range(0, 40):
        for end in (begin + 1, begin + 7, 131):
            assert torch.equal(of_all(kernel, x[begin:end].clone()), together[begin:end])


@given(st.integers(0, 40), st.integers(1, 7))
def test_threads_share_out_every_item_once(items: int, threads: int) -> None:
    visits = np.zeros(items, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        share(_count_kernel, items, items * compiled.MIN_SHARE, visits)
    assert visits.tolist() == [1] * items


def parts_of(items: int, operations: int) -> dict[int, int]:
    """Begin and end of each call that `share` makes."""
    ends = np.zeros(items, dtype=np.int64)
    share(_mark_kernel, items, operations, ends)
    return {int(begin): int(ends[begin]) for begin in np.flatnonzero(ends)}


def test_little_work_stays_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert parts_of(100, 2 * compiled.MIN_SHARE - 1) == {0: 100}
    assert parts_of(100, 2 * compiled.MIN_SHARE) == {0: 50, 50: 100}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_and_a_machine_without_openmp_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert parts_of(10, 10 * compiled.MIN_SHARE) == {0: 5, 5: 10}
    if not (child := os.fork()):
        os._exit(0 if parts_of(10, 10 * compiled.MIN_SHARE) == {0: 10} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    monkeypatch.setattr(compiled, "has_openmp", lambda: False)
    assert parts_of(10, 10 * compiled.MIN_SHARE) == {0: 10}


def test_several_threads_may_share_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    visits = [np.zeros(1000, dtype=np.int64) for _ in range(4)]

    def count(mine: np.ndarray) -> None:
        for _ in range(50):
            share(_count_kernel, len(mine), 10 * compiled.MIN_SHARE, mine)

    threads = [threading.Thread(target=count, args=(mine,)) for mine in visits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((mine == 50).all() for mine in visits)


@given(st.integers(1, 4), st.integers(0, 9), st.sampled_from([1, 3, 16, 17, 31, 32, 48, 64, 65, 112, 130]))
def test_weighted_sums_are_added_one_after_another(together: int, count: int, width: int) -> None:
    """Each step is `fma`, the same by panels and alone; NumPy's long double of 64 bits rounds like it here."""
    weights, rows, out = (torch.randn(*shape) for shape in ((together, count), (count, width), (together, width)))
    expected = out.numpy().copy()
    for weight, row in zip(weights.t()[:, :, None].numpy(), rows.numpy(), strict=True):
        expected = (row.astype(np.longdouble) * weight + expected).astype(np.float32)
    share(_weighted_kernel, 1, 0, weights, rows, out)
    assert np.array_equal(out.numpy(), expected)


@pytest.mark.parametrize(("chunk", "dim"), [(4, 3), (16, 8), (64, 24), (80, 5), (112, 1)])
def test_scores_of_keys_are_the_same_in_panels_of_any_number(chunk: int, dim: int) -> None:
    query, keys = torch.randn(3, dim), torch.full((chunk, dim), torch.nan)
    panels, scores = panels_of(keys), torch.empty(3, chunk)
    expected = torch.zeros(chunk, 3)
    for row in range(chunk):
        key = torch.randn(dim)
        panels[row // panels.shape[2], :, row % panels.shape[2]] = key
        share(_weighted_kernel, 1, 0, query, key.unsqueeze(1), own := torch.zeros(3, 1))
        expected[row] = own.squeeze(1)
        share(_score_kernel, row + 1, 0, query, panels, scores)
        assert torch.equal(scores[:, : row + 1], expected[: row + 1].t())


def test_bf16_arrives_as_bits_and_is_read_as_numbers() -> None:
    x = torch.tensor([1.0, -0.0, 3.140625, math.inf, -math.nan, 2.0**-133]).bfloat16()
    y = torch.empty(len(x))
    share(_read_kernel, len(x), 0, x, y)
    assert torch.equal(y.view(torch.int32), x.float().view(torch.int32))


def test_only_contiguous_memory_is_shown_to_kernels() -> None:
    x = torch.arange(6.0).view(2, 3)
    with pytest.raises(AssertionError, match="contiguous"):
        array(x.t())
    array(x)[0, 1] = 7.0
    assert x[0, 1] == 7.0
    assert plain(x.bfloat16().t()).tolist() == [[0.0, 3.0], [7.0, 4.0], [2.0, 5.0]]


def test_without_numba_a_call_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "numba", None)
    kernel = compiled.compiled(lambda begin, end: None)
    with pytest.raises(RuntimeError, match=r"needs Numba.*pip install"):
        share(kernel, 1, 1)


def test_kept_code_belongs_to_the_sources_and_a_home_that_cannot_be_written_keeps_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder_of = compiled._cache_folder.__wrapped__
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "given"))
    assert Path(folder_of()).parent == tmp_path / "given"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Path(folder_of()).parent == tmp_path / "lockstep" / "kernels"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert folder_of() == ""
