"""Kernels for a CPU, compiled by Numba when they are first called. Private to `ops`.

Two things make their bits a function of their operands alone (design A1, A2), whatever the machine's vector width.
Floating-point rules are strict: the compiler may use vector instructions, but it neither reorders a sum nor fuses a
product with one unless `fma` is written. And threads share out whole items, so no sum crosses from one to another.

A kernel has the form `kernel(begin, end, ...)`: items begin .. end - 1 of its work, on NumPy views of tensors. BF16
tensors arrive as their bits, int16, and `number` and `stored` convert them. Compiled code is kept in the user's cache
folder, under a digest of all sources here.
"""

import hashlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import numba
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:
    numba = None


@cache
def features() -> dict[str, bool]:
    """Of this CPU, by LLVM's names."""
    return {} if numba is None else dict(binding.get_host_cpu_features())


MIN_SHARE = 50_000  # operations for each thread, some 10 microseconds: a team starts in less
f32 = np.float32


def compiled(function: Callable[..., Any], parallel: bool = False) -> Any:
    """Decorates a kernel, or a helper that kernels call."""
    if numba is None:
        return _missing(function)
    before, folder = numba.config.CACHE_DIR, _cache_folder()
    numba.config.CACHE_DIR = folder or before
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False, "parallel": parallel}
    try:
        return numba.njit(cache=bool(folder), **options)(function)
    finally:
        numba.config.CACHE_DIR = before


def _missing(function: Callable[..., Any]) -> Callable[..., Any]:
    def missing(*_: Any) -> Any:
        raise RuntimeError(f"{function.__module__} on a CPU needs Numba, which is not installed: pip install numba")

    return missing


@cache
def _cache_folder() -> str:
    """Numba looks at a kernel's own file only when it asks whether kept code is stale, hence a folder for all sources,
    in NUMBA_CACHE_DIR or the user's cache. Empty where none can be made."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep" / "kernels"
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or home) / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(folder)


def share(kernel: Any, items: int, operations: int, *arguments: Any) -> None:
    """Runs `kernel(begin, end, *arguments)` over all items, on as many of torch's threads as are worth waking.

    operations: about how many floating-point operations all items take. Tensors arrive as arrays (`array`).
    """
    arrays = [array(x) if isinstance(x, Tensor) else x for x in arguments]
    parts = min(torch.get_num_threads(), items, operations // MIN_SHARE)
    if parts < 2 or not _has_team():
        call = partial(kernel, 0, items, *arrays)
    else:
        prepare_team()
        call = partial(_shared(kernel), parts, items, *arrays)
    call()
    if watch := getattr(_watchers, "watch", None):
        watch(call)


def prepare_team() -> None:
    """Kernels that this thread calls are shared by as many threads as torch has."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if _has_team() and numba.get_num_threads() != threads:
        numba.set_num_threads(threads)


_watchers = threading.local()


@contextmanager
def watching(watch: Callable[[partial[None]], object]) -> Iterator[None]:
    """Tells `watch` of every kernel's call that this thread makes."""
    _watchers.watch = watch
    try:
        yield
    finally:
        del _watchers.watch


def _share(parts, items, *arguments):
    for part in numba.prange(parts):
        kernel(items * part // parts, items * (part + 1) // parts, *arguments)  # type: ignore[name-defined]  # noqa: F821


@cache
def _shared(kernel: Any) -> Any:
    """`_share` of this kernel. A function of its own, because Numba keeps no compiled code of closures."""
    own = FunctionType(_share.__code__, {**globals(), "kernel": kernel})
    own.__module__, own.__name__, own.__qualname__ = kernel.__module__, (name := f"share{kernel.__name__}"), name
    return compiled(own, parallel=True)


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def _has_team() -> bool:
    """Is there an OpenMP to share with? Its threads wait as torch's do: a pool of Python's would fight with those for
    the cores, and lose more than it gains. A forked child has lost them."""
    return not _forked and has_openmp()


@cache
def has_openmp() -> bool:
    """Without, kernels take one thread. Numba's other teams bear no calls from several threads, or are rarely there."""
    if numba is None:
        return False
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        return False
    numba.config.THREADING_LAYER = "omp"
    return True


def array(x: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on a CPU."""
    assert x.is_contiguous(), "kernels are compiled for contiguous arrays"
    x = x.detach() if x.requires_grad else x
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def plain(x: Tensor) -> Tensor:
    """x in FP32 and contiguous."""
    return x.float().contiguous()


def readable(x: Tensor) -> Tensor:
    """x contiguous, in FP32 or BF16."""
    return (x if x.dtype == torch.bfloat16 else x.float()).contiguous()


LINE = 64  # bytes of memory that come together
PANEL = 16  # numbers side by side that `add_panels` takes together


if numba is not None:
    # What Numba has no name for.

    @intrinsic
    def fma(_, a, b, c):
        """a * b + c, rounded once."""
        signature = types.float32(types.float32, types.float32, types.float32)
        return signature, lambda context, builder, signature, args: builder.fma(*args)

    @intrinsic
    def _bits(_, x):
        def generate(context, builder, signature, args):
            return builder.bitcast(args[0], context.get_value_type(types.int32))

        return types.int32(types.float32), generate

    @intrinsic
    def _number(_, bits):
        def generate(context, builder, signature, args):
            return builder.bitcast(args[0], context.get_value_type(types.float32))

        return types.float32(types.int32), generate

    @intrinsic
    def number(_, x):
        """What is read from an FP32 or a BF16 array, as FP32."""

        def generate(context, builder, signature, args):
            if signature.args[0] == types.float32:
                return args[0]
            wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())

        return types.float32(x), generate

    @intrinsic
    def stored(_, x, array):
        """FP32 x as `array` holds it, FP32 or BF16 (rounded to nearest, ties to even, as torch does)."""
        bf16 = array.dtype == types.int16

        def generate(context, builder, signature, args):
            if not bf16:
                return args[0]
            wide, constant = ir.IntType(32), lambda n: ir.Constant(ir.IntType(32), n)
            bits = builder.bitcast(args[0], wide)
            odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
            bits = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF))), constant(16))
            is_nan = builder.fcmp_unordered("uno", args[0], args[0])
            return builder.trunc(builder.select(is_nan, constant(0x7FC0), bits), ir.IntType(16))

        return array.dtype(types.float32, array), generate

    def read_numbers(builder, place, count, mask=None):
        """A vector of `count` numbers from a pointer to FP32 or to BF16, zero where a mask forbids to read."""
        floats, words = ir.VectorType(ir.FloatType(), count), ir.VectorType(ir.IntType(32), count)
        is_fp32 = place.type.pointee == ir.FloatType()
        kind, align = (floats, 4) if is_fp32 else (ir.VectorType(ir.IntType(16), count), 2)
        place = builder.bitcast(place, kind.as_pointer())
        if mask is None:
            value = builder.load(place, align=align)
        else:
            function = ir.FunctionType(kind, [place.type, ir.IntType(32), mask.type, kind])
            name = f"llvm.masked.load.v{count}{'f32' if is_fp32 else 'i16'}.p0"
            function = cgutils.get_or_insert_function(builder.module, function, name)
            value = builder.call(function, [place, ir.Constant(ir.IntType(32), align), mask, ir.Constant(kind, None)])
        if is_fp32:
            return value
        return builder.bitcast(builder.shl(builder.zext(value, words), ir.Constant(words, [16] * count)), floats)

    def prefetch(builder, place):
        """The line of memory at a pointer comes into the second level of the cache."""
        word = ir.IntType(32)
        place = builder.bitcast(place, ir.IntType(8).as_pointer())
        function = ir.FunctionType(ir.VoidType(), [place.type, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
        builder.call(function, [place] + [ir.Constant(word, n) for n in (0, 2, 1)])

    def _reduction(width, kind):
        """Of count >= 1 numbers of x, FP32 or BF16: their sum, the sum of their products with y, or the largest. Lane l
        takes in numbers l, width + l and so on; then upper halves of the lanes join lower ones. All in registers."""

        @intrinsic
        def reduce(_, x, y, count):
            def generate(context, builder, signature, args):
                x, y = (context.make_array(signature.args[i])(context, builder, value=args[i]).data for i in (0, 1))
                count, size, index = args[2], args[2].type, ir.IntType(32)
                vector = ir.VectorType(ir.FloatType(), width)
                total, none = cgutils.alloca_once(builder, vector), ir.Constant(vector, None)

                def read(array, at, mask):
                    return read_numbers(builder, builder.gep(array, [at]), width, mask)

                def better(a, b):
                    return builder.select(builder.fcmp_ordered(">", a, b), a, b)

                def take(at, mask=None):
                    value, before = read(x, at, mask), builder.load(total)
                    if kind == "sum":
                        after = builder.fadd(before, value)
                    elif kind == "products":
                        function = ir.FunctionType(vector, [vector] * 3)
                        function = cgutils.get_or_insert_function(builder.module, function, f"llvm.fma.v{width}f32")
                        after = builder.call(function, [value, read(y, at, mask), before])
                    else:
                        after = better(value, before)
                        after = after if mask is None else builder.select(mask, after, before)
                    builder.store(after, total)

                def everywhere(value, vectors):
                    one = builder.insert_element(ir.Constant(vectors, ir.Undefined), value, ir.Constant(index, 0))
                    lanes = ir.Constant(ir.VectorType(index, width), None)
                    return builder.shuffle_vector(one, ir.Constant(vectors, ir.Undefined), lanes)

                first = read_numbers(builder, x, 1)
                first = builder.extract_element(first, ir.Constant(index, 0))
                builder.store(everywhere(first, vector) if kind == "largest" else none, total)
                with cgutils.for_range(builder, builder.udiv(count, ir.Constant(size, width))) as loop:
                    take(builder.mul(loop.index, ir.Constant(size, width)))
                rest = builder.urem(count, ir.Constant(size, width))
                with builder.if_then(builder.icmp_unsigned("!=", rest, ir.Constant(size, 0))):
                    words = ir.VectorType(index, width)
                    mask = builder.icmp_unsigned(
                        "<", ir.Constant(words, list(range(width))), everywhere(builder.trunc(rest, index), words)
                    )
                    take(builder.sub(count, rest), mask)
                value, lanes = builder.load(total), width
                while lanes > 1:
                    lanes //= 2
                    lower, upper = (
                        builder.shuffle_vector(
                            value, value, ir.Constant(ir.VectorType(index, lanes), list(range(at, at + lanes)))
                        )
                        for at in (0, lanes)
                    )
                    value = better(upper, lower) if kind == "largest" else builder.fadd(lower, upper)
                return builder.extract_element(value, ir.Constant(index, 0))

            return types.float32(x, y, types.intp), generate

        return reduce

    _sum_16, _sum_64 = (_reduction(width, "sum") for width in (16, 64))
    _products_16, _products_64 = (_reduction(width, "products") for width in (16, 64))
    _largest = _reduction(64, "largest")

    def _panels(rows, count):
        """Of `rows` rows and `count` panels."""

        @intrinsic
        def add(_, weights, weights_at, weights_step, x, step, panel, out, out_at, out_step, terms, ahead, stride, q):
            """out[r, PANEL p + i] += weights[r, t] x[step t + panel p + i] for t < terms in order, from panel p = q on,
            x FP32 or BF16; row r of weights and out begins at their place plus r steps. The sums stay in registers,
            which LLVM does not find by itself. As many numbers come into the cache, x[ahead + stride t + PANEL p + i].
            """

            def generate(context, builder, signature, args):
                weights, x, out = (
                    context.make_array(signature.args[i])(context, builder, value=args[i]).data for i in (0, 3, 6)
                )
                weights_at, weights_step, step, panel = (args[i] for i in (1, 2, 4, 5))
                out_at, out_step, terms, ahead, stride, q = args[7:]
                x_at, before = builder.mul(panel, q), builder.mul(ir.Constant(q.type, PANEL), q)
                out_at, ahead = builder.add(out_at, before), builder.add(ahead, before)
                vector, index = ir.VectorType(ir.FloatType(), PANEL), ir.IntType(32)
                lanes, none = ir.Constant(ir.VectorType(index, PANEL), None), ir.Constant(vector, ir.Undefined)
                multiply_add = cgutils.get_or_insert_function(
                    builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{PANEL}f32"
                )

                def place(array, at):
                    return builder.bitcast(builder.gep(array, [at]), vector.as_pointer())

                def row(at, step, r):
                    return builder.add(at, builder.mul(step, ir.Constant(at.type, r)))

                def everywhere(value):
                    return builder.shuffle_vector(
                        builder.insert_element(none, value, ir.Constant(index, 0)), none, lanes
                    )

                cells = [(r, p) for r in range(rows) for p in range(count)]
                results = {
                    (r, p): place(out, builder.add(row(out_at, out_step, r), ir.Constant(out_at.type, PANEL * p)))
                    for r, p in cells
                }
                sums = {cell: cgutils.alloca_once(builder, vector) for cell in cells}
                for cell in cells:
                    builder.store(builder.load(results[cell], align=4), sums[cell])
                sources = [builder.gep(weights, [row(weights_at, weights_step, r)]) for r in range(rows)]
                with cgutils.for_range(builder, terms) as loop:
                    at = builder.add(x_at, builder.mul(loop.index, step))
                    values = [read_numbers(builder, builder.gep(x, [row(at, panel, p)]), PANEL) for p in range(count)]
                    later = builder.add(ahead, builder.mul(loop.index, stride))
                    for n in range(0, PANEL * count, LINE // (4 if x.type.pointee == ir.FloatType() else 2)):
                        prefetch(builder, builder.gep(x, [builder.add(later, ir.Constant(later.type, n))]))
                    for r, source in enumerate(sources):
                        weight = everywhere(builder.load(builder.gep(source, [loop.index])))
                        for p, value in enumerate(values):
                            total = builder.load(sums[r, p])
                            builder.store(builder.call(multiply_add, [weight, value, total]), sums[r, p])
                for cell in cells:
                    builder.store(builder.load(sums[cell]), results[cell], align=4)
                return context.get_dummy_value()

            i = types.intp
            return types.void(weights, i, i, x, i, i, out, i, i, i, i, i, i), generate

        return add

    # As many panels beside the rows as registers hold sums: of 16 numbers with AVX-512, else in pairs of 8.
    _WIDE = [min(4, (16 if features().get("avx512f") else 4) // rows) for rows in range(1, 5)]
    _one_row, _two_rows, _three_rows, _four_rows = (_panels(rows + 1, _WIDE[rows]) for rows in range(4))
    _one_cell, _two_cells, _three_cells, _four_cells = (_panels(rows + 1, 1) for rows in range(4))
    _WIDE_1, _WIDE_2, _WIDE_3, _WIDE_4 = _WIDE


ZERO, ONE = f32(0.0), f32(1.0)
_LOG2_E, _ROUND = f32(1.4426950408889634), f32(1.5 * 2.0**23)  # x + _ROUND - _ROUND is x rounded to a whole number
_LN2_HIGH, _LN2_LOW = f32(-0.693359375), f32(2.12194440e-4)  # -ln 2 in two parts, the first exact in 10 bits
_LEAST, _LARGEST = f32(-87.33654), f32(88.0)  # below, exp is no normal number
# exp(r) = 1 + r + r^2 (polynomial) for |r| <= ln 2 / 2: Cephes' expf.
_E0, _E1, _E2 = f32(1.9875691500e-4), f32(1.3981999507e-3), f32(8.3334519073e-3)
_E3, _E4, _E5 = f32(4.1665795894e-2), f32(1.6666665459e-1), f32(5.0000001201e-1)
_INFINITY = f32(np.inf)


@compiled
def exp(x):
    """e^x in FP32, within 1.5 units in the last place; 0 where that is no normal number, infinity above 88."""
    y = x if x > _LEAST else _LEAST
    y = y if y < _LARGEST else _LARGEST
    shifted = fma(y, _LOG2_E, _ROUND)
    power = shifted - _ROUND
    r = fma(power, _LN2_LOW, fma(power, _LN2_HIGH, y))
    p = fma(fma(fma(fma(fma(_E0, r, _E1), r, _E2), r, _E3), r, _E4), r, _E5)
    p = fma(p, r * r, r) + ONE
    # The last bits of `shifted` are the power of two, which is added to the exponent.
    scale = _number(np.int32((_bits(shifted) << np.int32(23)) + np.int32(0x3F800000)))
    result = p * scale if x >= _LEAST else ZERO
    result = _INFINITY if x > _LARGEST else result
    return result if x == x else x


@compiled
def sigmoid(x):
    return ONE / (ONE + exp(-x))


@compiled
def largest(x):
    """Of at least one number; NaN counts as nothing unless it is the first."""
    return _largest(x, x, x.shape[0])


# Sums of L partial sums, added at last, halves upon halves: number i % L takes term i, so vectors can be added. L
# is part of the order, hence of the bits.


@compiled
def sum_16(x):
    return _sum_16(x, x, x.shape[0])


@compiled
def sum_64(x):
    return _sum_64(x, x, x.shape[0])


@compiled
def dot_16(x, y):
    return _products_16(x, y, x.shape[0])


@compiled
def dot_64(x, y):
    return _products_64(x, y, x.shape[0])


TOGETHER = 4  # rows that `add_panels` takes at most


@compiled
def add_panels(rows, weights, weights_at, x, step, panel, panels, out, out_at, terms, ahead=0):
    """out[r, out_at + PANEL p + i] += sum over t < terms, in order, of weights[r, weights_at + t] times
    x[step t + panel p + i], for i < PANEL and p < panels, in the first `rows` <= TOGETHER rows.

    Meanwhile as many numbers come into the cache from x[ahead] on: the machine fetches what follows in memory, but does
    not know which block is next.
    """
    p, w, o, stride = 0, weights.shape[1], out.shape[1], PANEL * panels
    if rows == 4:
        while panels - p >= _WIDE_4:
            _four_rows(weights, weights_at, w, x, step, panel, out, out_at, o, terms, ahead, stride, p)
            p += _WIDE_4
        while p < panels:
            _four_cells(weights, weights_at, w, x, step, panel, out, out_at, o, terms, ahead, stride, p)
            p += 1
    elif rows == 3:
        while panels - p >= _WIDE_3:
            _three_rows(weights, weights_at, w, x, step, panel, out, out_at, o, terms, ahead, stride, p)
            p += _WIDE_3
        while p < panels:
            _three_cells(weights, weights_at, w, x, step, panel, out, out_at, o, terms, ahead, stride, p)
            p += 1
    elif rows == 2:
        while panels - p >= _WIDE_2:
            _two_rows(weights, weights_at, w, x, step, panel, out, out_at, o, terms, ahead, stride, p)
            p += _WIDE_2
        while p < panels:
            _two_cells(weights, weights_at, w, x, step, panel, out, out_at, o, terms, ahead, stride, p)
            p += 1
    elif rows == 1:
        while panels - p >= _WIDE_1:
            _one_row(weights, weights_at, w, x, step, panel, out, out_at, o, terms, ahead, stride, p)
            p += _WIDE_1
        while p < panels:
            _one_cell(weights, weights_at, w, x, step, panel, out, out_at, o, terms, ahead, stride, p)
            p += 1


@compiled
def add_weighted(rows, weights, weights_at, x, count, out, ahead=0):
    """out[r] [d] += the weights [r, weights_at + j] times x[j], j < count in order, in `rows` <= TOGETHER rows."""
    width = out.shape[1]
    panels = width // PANEL
    add_panels(rows, weights, weights_at, x, width, PANEL, panels, out, 0, count, ahead)
    for r in range(rows):
        for j in range(count):
            for e in range(panels * PANEL, width):
                out[r, e] = fma(weights[r, weights_at + j], number(x[j, e]), out[r, e])


# The keys of a chunk lie in panels [C / W, d, W]: W neighbouring keys side by side, for vector instructions, and a key
# in few pages.


def panels_of(keys: Tensor) -> Tensor:
    """Memory of keys [..., C, d] as the CPU path fills it, [..., C / W, d, W]."""
    chunk, dim = keys.shape[-2:]
    width = PANEL if chunk % PANEL == 0 else chunk
    return keys.view(*keys.shape[:-2], chunk // width, dim, width)


@compiled
def score_keys(rows, queries, keys, count, scores, at, ahead=0):
    """scores[r, at + j] of a query [r, d] with key j < count of a chunk [C / W, d, W], over d in order, in the first
    `rows` <= TOGETHER rows. Behind them the scores are whatever a panel has there."""
    dim, width = keys.shape[1:]
    panels = (count + width - 1) // width
    scores[:rows, at : at + panels * width] = ZERO
    if width == PANEL:
        add_panels(rows, queries, 0, keys, PANEL, PANEL * dim, panels, scores, at, dim, ahead)
    else:
        for r in range(rows):
            for d in range(dim):
                for j in range(count):
                    scores[r, at + j] = fma(queries[r, d], number(keys[0, d, j]), scores[r, at + j])
