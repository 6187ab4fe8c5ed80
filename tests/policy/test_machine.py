"""The choice of dtype: taken as asked, or measured and then proved."""

import pytest
import torch

import ops
from policy import machine
from policy.machine import choose_device, choose_dtype

CPU = torch.device("cpu")


@pytest.fixture
def timings(monkeypatch) -> dict[torch.dtype, float]:
    """Seconds that the probe is made to measure."""
    seconds = {torch.float32: 1.4e-3, torch.bfloat16: 1e-3}
    monkeypatch.setattr(machine, "_seconds", seconds.__getitem__)
    return seconds


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_a_named_dtype_is_taken(name: str) -> None:
    assert choose_dtype(name, CPU) == (getattr(torch, name), f"{name}, as policy.dtype asks.")


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(setting).type for setting in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    assert choose_dtype("auto", torch.device("cuda"))[0] == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(ValueError, match=r"policy\.device = 'cuda': torch sees no GPU"):
        choose_device("cuda")


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"policy\.dtype = 'fp8': must be auto, bfloat16 or float32"):
        choose_dtype("fp8", CPU)


def test_auto_takes_bfloat16_where_it_is_clearly_faster(timings) -> None:
    dtype, reason = choose_dtype("auto", CPU)
    assert dtype == torch.bfloat16
    assert "1.00 ms in bfloat16 and 1.40 ms in float32" in reason


def test_auto_takes_float32_where_bfloat16_gains_little(timings) -> None:
    timings[torch.float32] = 1.2e-3
    dtype, reason = choose_dtype("auto", CPU)
    assert dtype == torch.float32
    assert "taken when it is 1.3 times faster" in reason


@pytest.mark.parametrize(("place", "rows"), [(0, 5), (-1, 7)])
def test_auto_takes_float32_where_bfloat16_rows_change_with_the_batch(timings, monkeypatch, place, rows) -> None:
    sound = ops.linear

    def variant(x, weight, dtype):
        y = sound(x, weight, dtype)
        if len(x) == rows:
            y[place, 0] = torch.nextafter(y[place, 0], torch.tensor(9.0, dtype=dtype))
        return y

    monkeypatch.setattr(ops, "linear", variant)
    dtype, reason = choose_dtype("auto", CPU)
    assert dtype == torch.float32
    assert f"rows change their bits in a batch of {rows}." in reason


def test_the_probe_measures_both_dtypes() -> None:
    assert 0 < machine._seconds(torch.float32) < 1
    assert 0 < machine._seconds(torch.bfloat16) < 1
