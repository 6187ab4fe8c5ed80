"""The choice of dtype: taken as asked, or by the kind of CPU and then proved."""

import pytest
import torch

import ops
from policy.machine import choose_device, choose_dtype

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("kind", ["tiles", "pairs", "numbers"])
def test_auto_takes_bfloat16_where_the_cpu_has_units_for_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "bf16_products", lambda: kind)
    dtype, reason = choose_dtype("auto", CPU)
    assert dtype == (torch.float32 if kind == "numbers" else torch.bfloat16)
    assert ("has no units" in reason) == (kind == "numbers")


@pytest.mark.parametrize(("place", "rows"), [(0, 5), (-1, 7)])
def test_auto_takes_float32_where_bfloat16_rows_change_with_the_batch(monkeypatch, place, rows) -> None:
    monkeypatch.setattr(ops, "bf16_products", lambda: "pairs")
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
