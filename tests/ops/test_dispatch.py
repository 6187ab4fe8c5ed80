"""The one decision point: which path a call takes, what it says, and how a test or a setting overrides it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ops
from ops import dispatch
from ops.dispatch import FAST_FORMS, Path, choose, explain, force, use_fast

CPU = torch.empty(0)
GPU: Any = SimpleNamespace(is_cuda=True, device="cuda:0")


@pytest.fixture(autouse=True)
def _aligned_again() -> Iterator[None]:
    yield
    use_fast([])


def test_the_device_decides() -> None:
    assert choose("linear", CPU) is Path.CPU
    assert choose("linear", GPU) is Path.TRITON
    assert explain("linear", CPU) == "linear: cpu (cpu has no Triton)"
    assert explain("linear", GPU) == "linear: triton (cuda:0 is a GPU)"


def test_a_gpu_without_triton_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton", None)
    with pytest.raises(RuntimeError, match=r"^linear on cuda:0 needs Triton, .* pip install triton$"):
        choose("linear", GPU)
    assert choose("linear", CPU) is Path.CPU


def test_a_test_forces_a_path_and_lets_go_of_it() -> None:
    with force(Path.TRITON):
        assert choose("swiglu", CPU) is Path.TRITON
        with force(Path.CPU):
            assert explain("swiglu", GPU) == "swiglu: cpu (forced by a test)"
        assert explain("swiglu", CPU) == "swiglu: triton (forced by a test)"
    with pytest.raises(KeyError), force(Path.TRITON):
        raise KeyError
    assert choose("swiglu", CPU) is Path.CPU


def test_only_the_named_operators_are_fast() -> None:
    use_fast(["linear"])
    assert choose("linear", CPU) is choose("linear", GPU) is Path.FAST
    assert choose("rms_norm", CPU) is Path.CPU
    assert explain("linear", GPU).startswith("linear: fast (chosen by setting, not aligned: stock matrix product")
    use_fast(["rms_norm"])
    assert (choose("linear", CPU), choose("rms_norm", CPU)) == (Path.CPU, Path.FAST)


def test_a_setting_holds_under_a_forced_path() -> None:
    """Kernel tests force Triton around everything; those of fast forms set them inside."""
    use_fast(["linear"])
    with force(Path.TRITON):
        assert choose("linear", CPU) is Path.FAST


def test_what_has_no_fast_form_is_refused_and_changes_nothing() -> None:
    use_fast(["linear"])
    with pytest.raises(ValueError, match=r"^no fast form of experts, route; there is one of linear, "):
        use_fast(["route", "linear", "experts"])
    assert choose("linear", CPU) is Path.FAST


def _linear() -> torch.Tensor:
    return ops.linear(torch.randn(5, 48), torch.randn(7, 48), torch.float32)


def _rms_norm() -> torch.Tensor:
    h, delta, weight = torch.randn(5, 48), torch.randn(5, 48), torch.randn(48)
    return torch.cat([ops.rms_norm(h, weight, 1e-6), *ops.add_rms_norm(h, delta, weight, 1e-6)])


def _softmax_attention() -> torch.Tensor:
    q, k, v = torch.randn(21, 4, 16), torch.randn(21, 2, 16), torch.randn(21, 2, 16)
    return ops.softmax_attention(q, k, v, ops.ChunkLayout.build([16, 5], 16))


def _lightning_attention() -> torch.Tensor:
    """Three decode steps of two sequences, from an empty cache."""
    decay = ops.DecayTables.build(torch.tensor([0.5, 0.25], dtype=torch.float64), 16)
    state, key, value = torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16, 16)
    cache = ops.LightningCache(state, key, value, torch.arange(2))
    steps = []
    for position in range(3):
        layout = ops.ChunkLayout.build([1, 1], 16, [position, position])
        steps.append(ops.lightning_attention(*torch.randn(3, 2, 2, 16), decay, layout, cache))
    return torch.cat(steps)


RUNS = {
    "linear": _linear,
    "rms_norm": _rms_norm,
    "softmax_attention": _softmax_attention,
    "lightning_attention": _lightning_attention,
}


@pytest.mark.parametrize("operator", FAST_FORMS)
def test_the_fast_form_computes_the_same_but_for_rounding(operator: str) -> None:
    results = []
    for names in ([], [operator]):
        use_fast(names)
        torch.manual_seed(1)
        results.append(RUNS[operator]())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
