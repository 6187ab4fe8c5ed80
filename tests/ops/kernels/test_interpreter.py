"""The repaired interpreter itself: its numbers are torch's, and it catches what it is there to catch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from ops.jit import divide_up, jit, launch, tl
from tests.ops.kernels import interpreter
from tests.ops.kernels.harness import assert_rows_alone, poison

BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@jit("size")
def _cast_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < size, other=0.0).to(y_ptr.dtype.element_ty), mask=at < size)


@jit("size")
def _arithmetic_kernel(a_ptr, b_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(y_ptr + at, tl.where(a > b, a * b, -a) + b)


@jit("size")
def _unmasked_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0) if MASKED else tl.load(x_ptr + at)
    tl.store(y_ptr + at, x, mask=at < size)


@jit("size")
def _store_kernel(y_ptr, size, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Programs STEP apart, BLOCK wide."""
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, at.to(tl.float32), mask=at < size)


@jit()
def _ticket_kernel(counter_ptr, ticket_ptr):
    tl.store(ticket_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


@jit("rows")
def _product_kernel(
    x_ptr, weight_ptr, y_ptr, rows, N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """y [rows, N] = x [rows, K] weight [K, N]; the sum over k in SPLITS parts."""
    row, column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None], tl.arange(0, N)[None, :]
    total = tl.zeros([BLOCK_M, N], dtype=tl.float32)
    for part in tl.static_range(SPLITS):
        k = part * (K // SPLITS) + tl.arange(0, K // SPLITS)
        x = tl.load(x_ptr + row * K + k[None, :], mask=row < rows, other=0.0)
        total += tl.dot(x, tl.load(weight_ptr + k[:, None] * N + column), input_precision="ieee")
    tl.store(y_ptr + row * N + column, total, mask=row < rows)


def raw(x: Tensor) -> Tensor:
    return x.view(RAW[x.element_size()])


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    launch(_cast_kernel, (divide_up(len(x), 65536),), x, y, len(x), BLOCK=65536)
    return y


def hard_numbers(dtype: torch.dtype) -> Tensor:
    """FP32: random bit patterns, the values of `dtype`, all midpoints between two, and these one ulp up and down."""
    patterns = np.random.default_rng(0).integers(0, 2**32, 50_000, dtype=np.uint32)
    exact = all_values(dtype).float()
    exact = exact[exact.isfinite()].sort().values
    middle = (exact[1:] + exact[:-1]) / 2
    infinity = torch.tensor(float("inf"))
    near = [middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)]
    edge = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, float("inf"), -float("inf"), float("nan")])
    return torch.cat([torch.from_numpy(patterns.view(np.float32)), exact, *near, edge])


def all_values(dtype: torch.dtype) -> Tensor:
    """One for each bit pattern."""
    return torch.arange(2 ** (8 * dtype.itemsize)).to(torch.int32).to(RAW[dtype.itemsize]).view(dtype)


@pytest.mark.parametrize("dtype", [BF16, E4M3, E5M2], ids=str)
def test_every_code_has_the_value_that_torch_gives_it(dtype: torch.dtype) -> None:
    codes = all_values(dtype)
    got, want = cast(codes, torch.float32), codes.float()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(raw(got)[~want.isnan()], raw(want)[~want.isnan()])


@pytest.mark.parametrize("dtype", [BF16, E4M3, E5M2], ids=str)
def test_casts_round_as_torch_does_and_fp8_saturates(dtype: torch.dtype) -> None:
    """torch lets e5m2 overflow to infinity; a GPU does not."""
    x = hard_numbers(dtype)
    want = (x.clamp(-LARGEST[dtype], LARGEST[dtype]) if dtype in LARGEST else x).to(dtype)
    got, number = cast(x, dtype), ~x.isnan()
    assert torch.equal(raw(got)[number], raw(want)[number])
    assert got.float().isnan()[~number].all()


def test_bf16_arithmetic_is_that_of_torch() -> None:
    a, b, y = torch.randn(4096).to(BF16), torch.randn(4096).to(BF16), torch.empty(4096, dtype=BF16)
    launch(_arithmetic_kernel, (1,), a, b, y, 4096, BLOCK=4096)
    assert torch.equal(y, torch.where(a > b, a * b, -a) + b)


def test_a_sum_runs_over_k_in_order() -> None:
    x, weight = torch.randn(16, 64), torch.randn(64, 16)
    total = torch.zeros(16, 16)
    for k in range(64):
        total = total + x[:, k, None] * weight[None, k]
    assert torch.equal(product(x, weight, 16), total)


def test_a_load_outside_every_tensor_is_found() -> None:
    x, y = torch.randn(100), torch.empty(100)
    launch(_unmasked_kernel, (2,), x, y, 100, BLOCK=64, MASKED=True)
    assert torch.equal(x, y)
    with pytest.raises(InterpreterError, match="out-of-bounds load: 28 lanes of program 1"):
        launch(_unmasked_kernel, (2,), x, y, 100, BLOCK=64, MASKED=False)


def test_a_store_outside_every_tensor_is_found() -> None:
    with pytest.raises(InterpreterError, match="out-of-bounds store: 4 lanes of program 0"):
        launch(_store_kernel, (1,), torch.empty(12), 16, BLOCK=16, STEP=16)


def test_two_programs_that_store_to_one_address_are_found() -> None:
    launch(_store_kernel, (4,), torch.empty(64), 64, BLOCK=16, STEP=16)
    with pytest.raises(InterpreterError, match=r"write-write race: programs \d and \d store to one address"):
        launch(_store_kernel, (4,), torch.empty(64), 64, BLOCK=32, STEP=16)


def test_programs_run_once_each_in_an_order_that_follows_the_seed() -> None:
    orders = []
    for seed in (1, 1, 2):
        counter, ticket = torch.zeros(1, dtype=torch.int32), torch.empty(50, dtype=torch.int32)
        with interpreter.adversarial(seed):
            launch(_ticket_kernel, (50,), counter, ticket)
        orders.append(ticket.tolist())
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] == orders[1] != orders[2] != sorted(orders[2])


def product(x: Tensor, weight: Tensor, block: int, splits: int = 1) -> Tensor:
    (rows, inner), columns = x.shape, weight.shape[1]
    y = torch.empty(rows, columns)
    launch(
        _product_kernel, (divide_up(rows, block),), x, weight, y, rows, N=columns, K=inner, BLOCK_M=block, SPLITS=splits
    )  # fmt: skip
    return y


def assert_rows_alone_in_bf16(run: Callable[[Tensor], Tensor]) -> None:
    """Rounded to BF16, behind which a difference in the last FP32 bit would hide."""
    assert_rows_alone(lambda x: (run(x).to(BF16),), [torch.randn(70, 128)])


def test_a_fixed_tile_and_a_fixed_split_pass() -> None:
    weight = torch.randn(128, 32)
    assert_rows_alone_in_bf16(lambda x: product(x, weight, 32))
    assert_rows_alone_in_bf16(lambda x: product(x, weight, 32, splits=4))


def test_a_tile_that_follows_the_number_of_rows_is_found() -> None:
    weight = torch.randn(128, 32)
    with pytest.raises(AssertionError, match="rows from 0 differ"):
        assert_rows_alone_in_bf16(lambda x: product(x, weight, 16 if len(x) <= 16 else 32))


def test_a_split_that_follows_the_load_is_found() -> None:
    weight = torch.randn(128, 32)
    with pytest.raises(AssertionError, match="rows from 0 differ"):
        assert_rows_alone_in_bf16(lambda x: product(x, weight, 32, splits=4 if len(x) <= 16 else 1))


def test_poison_shows_in_what_reads_it() -> None:
    """Rows of 100 numbers, the last 28 of 128 unused."""
    x, y = poison(1, 128), torch.empty(128)
    x[:, :100] = 1.0
    launch(_unmasked_kernel, (1,), x, y, 100, BLOCK=128, MASKED=True)
    assert y[:100].sum() == 100.0
    launch(_unmasked_kernel, (1,), x, y, 128, BLOCK=128, MASKED=False)
    assert y.sum().isnan()
    assert poison(2, dtype=BF16).isnan().all()
