"""Products by AMX tiles: within the bound of a sum in FP32, and an element has its bits whatever is beside it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ops
from ops import amx
from tests.ops.checks import UNIT

pytestmark = pytest.mark.skipif(not amx.has_amx(), reason="this CPU has no AMX")

FP32, BF16 = torch.float32, torch.bfloat16


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 130))
def test_product_is_off_by_the_rounding_of_a_sum_at_most(rows: int, width: int, terms: int) -> None:
    """A sum of n products in FP32 is off by n u sum |terms| at most (Higham, 3.5), in whatever order."""
    x, weight = torch.randn(rows, terms).to(BF16), torch.randn(width, terms)
    y, exact = amx.multiply(x, amx.pack(weight), width, FP32), weight.to(BF16).double()
    bound = terms * UNIT[FP32] * (x.double().abs() @ exact.abs().t())
    assert bool(((y - x.double() @ exact.t()).abs() <= bound).all())
    assert torch.equal(amx.multiply(x, amx.pack(weight), width, BF16), y.to(BF16)), "rounded once"


@pytest.mark.usefixtures("threads")
@given(st.integers(1, 600), st.integers(1, 200), st.sampled_from([1, 31, 32, 96, 700]), st.integers(0, 2**31))
def test_bits_do_not_depend_on_what_is_computed_beside(rows: int, width: int, terms: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, terms, generator=generator).to(BF16), torch.randn(width, terms, generator=generator)
    y = amx.multiply(x, amx.pack(weight), width, FP32)
    some, part = torch.randperm(rows, generator=generator)[: 1 + seed % rows], slice(seed % width, width)
    assert torch.equal(amx.multiply(x[some], amx.pack(weight[part]), width - part.start, FP32), y[some][:, part])


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 70), st.integers(1, 70))
def test_groups_have_the_bits_of_products_of_their_own(counts: list[int], width: int, terms: int) -> None:
    x, packed = torch.randn(sum(counts), terms).to(BF16), amx.pack(torch.randn(len(counts), width, terms))
    parts = [amx.multiply(rows, each, width, FP32) for rows, each in zip(x.split(counts), packed, strict=True)]
    assert torch.equal(amx.multiply(x, packed, width, FP32, counts), torch.cat(parts))


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 130))
def test_fp32_rows_keep_all_their_bits(rows: int, width: int, terms: int) -> None:
    """Three terms are exact, so only their sum is rounded: three times as many products."""
    x, weight = torch.randn(rows, terms), torch.randn(width, terms).to(BF16)
    y, exact = amx.multiply(amx.split(x), amx.pack(weight), width, FP32), weight.double()
    bound = 3 * terms * UNIT[FP32] * (x.double().abs() @ exact.abs().t())
    assert bool(((y - x.double() @ exact.t()).abs() <= bound).all())
    assert torch.equal(amx.multiply(amx.split(x[-1:]), amx.pack(weight), width, FP32), y[-1:])


def test_infinities_and_nan_reach_their_own_row_only() -> None:
    x = torch.randn(40, 64).to(BF16)
    clean = amx.multiply(x, amx.pack(weight := torch.randn(40, 64)), 40, FP32)
    x[7, 3], x[33, 0] = torch.inf, torch.nan
    y = amx.multiply(x, amx.pack(weight), 40, FP32)
    others = [row for row in range(40) if row not in (7, 33)]
    assert torch.equal(y[others], clean[others]) and not y[[7, 33]].isfinite().any()


def test_a_packed_weight_gives_the_same_layer() -> None:
    x, weight, experts = torch.randn(9, 70), torch.randn(50, 70), torch.randn(3, 2 * 33, 70)
    packed = ops.pack_weight(weight, BF16)
    assert torch.equal(ops.linear(x, weight, BF16, packed=packed), ops.linear(x, weight, BF16))
    down, ids, weights = torch.randn(3, 70, 33), torch.randint(0, 3, (9, 2)), torch.rand(9, 2)
    packs = ops.pack_weight(experts, BF16), ops.pack_weight(down, BF16)
    mixed = ops.experts(x, experts, down, ids, weights, BF16, packed=packs)
    assert torch.equal(mixed, ops.experts(x, experts, down, ids, weights, BF16))
    assert ops.pack_weight(weight, FP32) is None
