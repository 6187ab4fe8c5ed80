"""Compiled CPU kernels: what they compute with, how threads share their items, and what happens without Numba."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ops import compiled
from ops.compiled import array, exp, plain, share, sigmoid


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


def test_little_work_stays_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[tuple[int, int]]()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    share(lambda begin, end: calls.append((begin, end)), 100, 2 * compiled.MIN_SHARE - 1)
    assert calls == [(0, 100)]
    share(lambda begin, end: calls.append((begin, end)), 100, 2 * compiled.MIN_SHARE)
    assert sorted(calls[1:]) == [(0, 50), (50, 100)]


def test_an_error_in_another_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_later(begin: int, end: int) -> None:
        if begin:
            raise FloatingPointError("in the second half")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(FloatingPointError, match="second half"):
        share(fail_later, 2, 10 * compiled.MIN_SHARE)


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
