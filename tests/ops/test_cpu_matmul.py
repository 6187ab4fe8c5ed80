"""Products on a CPU: within the bound of a sum in FP32, and an element has its bits whatever is beside it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ops
from ops import cpu_matmul
from tests.ops.checks import UNIT

FP32, BF16 = torch.float32, torch.bfloat16

# Rows, the rounded weight, and whether they are multiplied in pairs.
KINDS = [
    pytest.param(BF16, BF16, True, id="pairs", marks=pytest.mark.skipif(
        not cpu_matmul.has_pairs(), reason="this CPU has no BF16 units"
    )),
    pytest.param(FP32, BF16, False, id="FP32 rows"),
    pytest.param(FP32, FP32, False, id="FP32"),
]  # fmt: skip
kinds = pytest.mark.parametrize(("rows_of", "dtype", "pairs"), KINDS)


def _bound(x: Tensor, weight: Tensor) -> Tensor:
    """A sum of n products in FP32 is off by n u sum |terms| at most (Higham, 3.5), in whatever order."""
    return x.shape[1] * UNIT[FP32] * (x.double().abs() @ weight.double().abs().t())


@kinds
@given(rows=st.integers(1, 70), width=st.integers(1, 70), terms=st.integers(1, 130))
def test_product_is_off_by_the_rounding_of_a_sum_at_most(
    rows_of: torch.dtype, dtype: torch.dtype, pairs: bool, rows: int, width: int, terms: int
) -> None:
    x, weight = torch.randn(rows, terms).to(rows_of), torch.randn(width, terms)
    packed, rounded = cpu_matmul.pack(weight, dtype, pairs), weight.to(dtype)
    y = cpu_matmul.multiply(x, packed, width, FP32)
    assert bool(((y - x.double() @ rounded.double().t()).abs() <= _bound(x, rounded)).all())
    assert torch.equal(cpu_matmul.multiply(x, packed, width, BF16), y.to(BF16)), "rounded once"
    assert torch.equal(cpu_matmul.multiply(x.float(), packed, width, FP32), y), "stored otherwise"
    assert torch.equal(cpu_matmul.pack(weight.t().contiguous(), dtype, pairs, transposed=True), packed)


@kinds
@pytest.mark.usefixtures("threads")
@given(
    rows=st.integers(1, 600), width=st.integers(1, 200), terms=st.sampled_from([1, 31, 32, 96, 700]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_bits_do_not_depend_on_what_is_computed_beside(
    rows_of: torch.dtype, dtype: torch.dtype, pairs: bool, rows: int, width: int, terms: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, terms, generator=generator), torch.randn(width, terms, generator=generator)
    x = x.to(rows_of)
    y = cpu_matmul.multiply(x, cpu_matmul.pack(weight, dtype, pairs), width, FP32)
    some, part = torch.randperm(rows, generator=generator)[: 1 + seed % rows], slice(seed % width, width)
    packed = cpu_matmul.pack(weight[part], dtype, pairs)
    assert torch.equal(cpu_matmul.multiply(x[some], packed, width - part.start, FP32), y[some][:, part])


@kinds
@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=5), width=st.integers(1, 70), terms=st.integers(1, 70))
def test_groups_have_the_bits_of_products_of_their_own(
    rows_of: torch.dtype, dtype: torch.dtype, pairs: bool, counts: list[int], width: int, terms: int
) -> None:
    x, weight = torch.randn(sum(counts), terms).to(rows_of), torch.randn(len(counts), width, terms)
    packed = cpu_matmul.pack(weight, dtype, pairs)
    parts = [cpu_matmul.multiply(rows, each, width, FP32) for rows, each in zip(x.split(counts), packed, strict=True)]
    bounds = torch.tensor([0, *counts]).cumsum(0)
    assert torch.equal(cpu_matmul.multiply(x, packed, width, FP32, bounds), torch.cat(parts))


@kinds
def test_infinities_and_nan_reach_their_own_row_only(rows_of: torch.dtype, dtype: torch.dtype, pairs: bool) -> None:
    x, packed = torch.randn(40, 64).to(rows_of), cpu_matmul.pack(torch.randn(40, 64), dtype, pairs)
    clean = cpu_matmul.multiply(x, packed, 40, FP32)
    x[7, 3], x[33, 0] = torch.inf, torch.nan
    y = cpu_matmul.multiply(x, packed, 40, FP32)
    others = [row for row in range(40) if row not in (7, 33)]
    assert torch.equal(y[others], clean[others]) and not y[[7, 33]].isfinite().any()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@given(rows=st.integers(0, 70), terms=st.integers(1, 130), width=st.integers(1, 70))
def test_matmul(dtype: torch.dtype, rows: int, terms: int, width: int) -> None:
    a, b = torch.randn(terms, rows).to(dtype).t(), torch.randn(terms, width).to(dtype)
    y = cpu_matmul.matmul(a, b, FP32)
    assert bool(((y - a.double() @ b.double()).abs() <= _bound(a, b.t())).all())


@pytest.mark.parametrize("units", [True, False], ids=["what this CPU has", "no BF16 units"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_packed_weight_gives_the_same_layer(dtype: torch.dtype, units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not units:
        monkeypatch.setattr(cpu_matmul, "has_pairs", lambda: False)
    x, weight, experts = torch.randn(9, 70), torch.randn(50, 70), torch.randn(3, 2 * 33, 70)
    packed = ops.pack_weight(weight, dtype)
    with torch.no_grad():
        assert torch.equal(ops.linear(x, weight, dtype, packed=packed), ops.linear(x, weight, dtype))
    assert torch.equal(ops.linear(x, weight, dtype, packed=packed), ops.linear(x, weight, dtype))
    packed = ops.pack_weight(weight, dtype, fp32_rows=True)
    assert torch.equal(ops.fp32_linear(x, weight, dtype, packed), ops.fp32_linear(x, weight, dtype))
    down, ids, weights = torch.randn(3, 70, 33), torch.randint(0, 3, (9, 2)), torch.rand(9, 2)
    packs = ops.pack_weight(experts, dtype), ops.pack_weight(down, dtype)
    mixed = ops.experts(x, experts, down, ids, weights, dtype, packed=packs)
    assert torch.equal(mixed, ops.experts(x, experts, down, ids, weights, dtype))
