"""Triton's interpreter made fit for proofs: right low-precision numbers, a sanitizer, a shuffled order, a nasty dot.

Four things are wrong with the stock interpreter for kernels like ours, and all four are replaced here:

- bf16 and fp8 are held as raw integers or cast by truncation, so products and casts are silently wrong. Here numpy
  arrays carry the real types of ml_dtypes; casts round to nearest even, fp8 saturates as the GPU's do.
- numpy's matmul gives one row other bits at another place of the tile. Here a dot sums k in ascending order: position
  decides nothing. The `adversarial` dot goes further: it permutes and scales by a hash of the tile's shape, as another
  matrix instruction would, so that a kernel whose tile follows the batch cannot pass a bitwise test.
- Loads and stores go anywhere. Here each must stay inside a tensor that the launch was given, and two programs must not
  write one address.
- Programs run in grid order. Here the order is a seeded shuffle.

Importing this module installs all of it into the running process, which must have TRITON_INTERPRET=1.
"""

import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock

Dot = Callable[[np.ndarray, np.ndarray], np.ndarray]

LOW = {
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    tl.float8e5: np.dtype(ml_dtypes.float8_e5m2),
}
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
RAW = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16)}


def sequential_dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row i, column j: the sum over k, ascending, one rounding per step."""
    product: np.ndarray = np.einsum("...mk,...kn->...mn", a, b)
    return product


def adversarial_dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Another order and a slightly wrong scale for each tile shape, the same for all tiles of one shape."""
    (m, k), n = a.shape[-2:], b.shape[-1]
    seed = zlib.crc32(f"{m} {k} {n}".encode())
    order = np.random.default_rng(seed).permutation(k)
    scale = np.float32(1 + seed % 97 * 2.0**-14)
    return sequential_dot(a[..., order].copy(), b[..., order, :].copy()) * scale


class Settings:
    """What the next launches use."""

    dot: Dot = staticmethod(sequential_dot)
    order_seed = 0
    reachable: tuple[torch.Tensor, ...] = ()


@contextmanager
def allow(*tensors: torch.Tensor) -> Iterator[None]:
    """Launches may reach these too: a kernel that finds its tensors by a table of addresses is given only the table."""
    before, Settings.reachable = Settings.reachable, tensors
    try:
        yield
    finally:
        Settings.reachable = before


@contextmanager
def adversarial(order_seed: int = 1) -> Iterator[None]:
    """Bitwise claims are made under this: the adversarial dot and another order of programs."""
    before = Settings.dot, Settings.order_seed
    Settings.dot, Settings.order_seed = staticmethod(adversarial_dot), order_seed
    try:
        yield
    finally:
        Settings.dot, Settings.order_seed = before


class _Launch:
    """Memory and order of the launch that is running."""

    begins, ends = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    writer: ClassVar[dict[int, int]] = {}
    order: np.ndarray | None = None
    program = 0


_stock_np_dtype = stock._get_np_dtype
_stock_init = stock.GridExecutor._init_args_hst
_stock_run = stock.GridExecutor.__call__
_stock_grid_index = stock.InterpreterBuilder.set_grid_idx


def _np_dtype(dtype: Any) -> np.dtype:
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    if isinstance(element, tl.pointer_type) or element not in LOW:
        return _stock_np_dtype(dtype)
    return LOW[element]


def _raw(values: np.ndarray) -> np.ndarray:
    if values.dtype not in LOW.values():
        return values
    return np.ascontiguousarray(values).view(RAW[values.dtype.itemsize])


def _checked(what: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
    """The addresses of the active lanes; IndexError unless each lies in a tensor of the launch."""
    addresses = np.broadcast_to(pointers, mask.shape)[mask].reshape(-1)
    owner = np.searchsorted(_Launch.begins, addresses, side="right").astype(np.int64) - 1
    outside = (owner < 0) | (addresses + np.uint64(size) > _Launch.ends[np.maximum(owner, 0)])
    if outside.any():
        raise IndexError(f"out-of-bounds {what}: {outside.sum()} lanes of program {_Launch.program}")
    return addresses


def _load(self: Any, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
    dtype = pointers.get_element_ty()
    kind = _np_dtype(dtype)
    _checked("load", pointers.data, mask.data, kind.itemsize)
    fill = np.zeros(pointers.data.shape, kind) if other is None else other.data.astype(kind)
    raw_kind = RAW[kind.itemsize] if kind in LOW.values() else kind
    found = stock._interpreter.load(pointers.data, mask.data, _raw(fill), raw_kind)
    return stock.TensorHandle(found.view(kind) if kind in LOW.values() else found, dtype)


def _store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> Any:
    addresses = _checked("store", pointers.data, mask.data, value.data.dtype.itemsize)
    for address in np.unique(addresses).tolist():
        if _Launch.writer.setdefault(address, _Launch.program) != _Launch.program:
            first = _Launch.writer[address]
            raise RuntimeError(f"write-write race: programs {first} and {_Launch.program} store to one address")
    return stock._interpreter.store(pointers.data, _raw(value.data), mask.data)


def _cast(self: Any, source: Any, dtype: Any, rounding: Any = None) -> Any:
    target, values = _np_dtype(dtype), source.data
    if values.dtype in LOW.values():
        values = values.astype(np.float32)
    if dtype.scalar in LARGEST:
        limit = LARGEST[dtype.scalar]
        values = np.clip(values.astype(np.float32), -limit, limit)
    assert rounding is None or rounding == stock._ir.ROUNDING_MODE.RTNE, "only round-to-nearest-even is modelled"
    return stock.TensorHandle(values.astype(target), dtype.scalar)


def _dot(self: Any, a: Any, b: Any, accumulator: Any, *_: Any) -> Any:
    exact = a.data.dtype.kind in "iu" or accumulator.data.dtype == np.float64
    kind = accumulator.data.dtype if exact else np.float32
    product = Settings.dot(a.data.astype(kind), b.data.astype(kind)) + accumulator.data
    return stock.TensorHandle(product.astype(accumulator.data.dtype), accumulator.dtype.scalar)


def _bf16(self: Any, value: float) -> Any:
    return stock.TensorHandle(np.array([value], LOW[tl.bfloat16]), tl.bfloat16)


def _grid_index(self: Any, x: int, y: int, z: int) -> None:
    nx, ny, nz = self.grid_dim
    if _Launch.order is None:
        _Launch.order = np.random.default_rng(Settings.order_seed).permutation(nx * ny * nz)
    _Launch.program = int(_Launch.order[(x * ny + y) * nz + z])
    _stock_grid_index(self, _Launch.program // (ny * nz), _Launch.program // nz % ny, _Launch.program % nz)


def _begin(self: Any, arguments: Any, keywords: Any) -> Any:
    host, host_keywords = _stock_init(self, arguments, keywords)
    tensors = [x for x in (*host, *host_keywords.values(), *Settings.reachable) if isinstance(x, torch.Tensor)]
    spans = {(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tensors}
    _Launch.begins = np.array(sorted(begin for begin, _ in spans), np.uint64)
    _Launch.ends = np.array(sorted(begin + size for begin, size in spans), np.uint64)
    _Launch.writer, _Launch.order = {}, None
    return host, host_keywords


def _run(self: Any, *arguments: Any, **keywords: Any) -> None:
    # A GPU raises no floating-point exceptions either, and is silent on a maximum of NaNs, as padding may hold them.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        _stock_run(self, *arguments, **keywords)


def _install() -> None:
    builder = stock.InterpreterBuilder
    stock._get_np_dtype = _np_dtype
    builder.create_masked_load, builder.create_masked_store = _load, _store
    builder.cast_impl = builder.create_fp_to_fp = _cast
    builder.create_dot, builder.get_bf16 = _dot, _bf16
    builder.set_grid_idx = _grid_index
    stock.GridExecutor._init_args_hst, stock.GridExecutor.__call__ = _begin, _run


_install()
