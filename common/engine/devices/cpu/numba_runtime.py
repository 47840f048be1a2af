"""How the CPU kernels are compiled: one decorator, and the few things LLVM must be told by hand.

Owns the numba settings. The kernels share torch's OpenMP thread pool (the `omp` layer binds to the
libgomp that torch has loaded), so that one pool of threads runs everything and no two pools fight
over the cores. Compiled code is cached on disk where that is possible (kernel_cache.py).

Floating point: reassociation and contraction are allowed, NaN and infinity are kept. That is
deterministic as long as there is one machine code per kernel, whose operations on a row depend on
that row's own lengths only. Numba alone does not give that: see compilation.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
import torch  # first, so that omp_pool finds its libgomp loaded
from llvmlite import ir
from numba import types
from numba.core import imputils
from numba.extending import intrinsic, overload
from numba.np import arrayobj, linalg

from common.engine.devices.cpu import compilation, kernel_cache, omp_pool
from common.errors import ConfigError

numba.config.THREADING_LAYER = "omp"
omp_pool.bind_to_torch()
compilation.install()

FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}

KERNEL_SOURCES = (  # of the engine; what the CPU does without compiling it is not among them
    "devices/cpu/attention.py",
    "devices/cpu/attention_vectors.py",
    "devices/cpu/compilation.py",
    "devices/cpu/kernel_cache.py",
    "devices/cpu/kernels.py",
    "devices/cpu/numba_runtime.py",
    "devices/cpu/philox.py",
    "devices/cpu/product_kernels.py",
    "devices/cpu/sampling.py",
    "devices/cpu/scaled_rows.py",
    "devices/cpu/selection.py",
    "devices/cpu/tiles.py",
    "devices/cpu/vectors.py",
    "devices/scaled_rows.py",
    "sampling/noise.py",
    "sampling/softmax_mass.py",
)

F = TypeVar("F", bound=Callable[..., Any])


def target() -> str:
    """What kernels are compiled by and for: numba's version and options, the processor, its features."""
    name, features = _processor()
    digest = hashlib.blake2b(f"{features} {kernel_cache.options()}".encode(), digest_size=3).hexdigest()
    return f"{name}-{digest}-numba-{numba.__version__}"


def compiles_for(feature: str) -> bool:
    """Whether kernels may use this feature of a processor, in LLVM's words. The environment may tell numba of
    a lesser one than the host's (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES, NUMBA_ENABLE_AVX), for which LLVM ends
    the process where it is asked for more."""
    return f"+{feature}" in _processor()[1].split(",")


def _processor() -> tuple[str, str]:
    """Name and features of the processor that numba compiles for."""
    _, name, features = numba.core.registry.cpu_target.target_context.codegen().magic_tuple()
    return name, features


def kernel_sources() -> list[Path]:
    """The files of which any change is another machine code."""
    engine = Path(__file__).parents[2]
    return [engine / name for name in KERNEL_SOURCES]


numba.config.CACHE_DIR = kernel_cache.directory(kernel_sources())


def _do_without_blas() -> None:
    """Keep scipy out of the process.

    Where it is installed, numba imports `scipy.linalg` only to see whether kernels could call its BLAS, which
    takes a tenth of the start of a node. Ours call none.
    """

    def missing() -> None:
        raise ImportError("kernels call no BLAS")

    linalg.ensure_blas = missing


_do_without_blas()


def kernel(function: F) -> F:
    """Compile with parallel `prange` loops, without the GIL, and FAST_MATH."""
    return _compile(function, parallel=True, fastmath=FAST_MATH)


def inline(function: F) -> F:
    """Compile a function that kernels call; inlined by LLVM."""
    return _compile(function, parallel=False, fastmath=FAST_MATH)


def exact_kernel(function: F) -> F:
    """As `kernel`, with IEEE arithmetic as written: no fused multiply-add, no reordering."""
    return _compile(function, parallel=True, fastmath=False)


def exact(function: F) -> F:
    """As `inline`, with IEEE arithmetic as written."""
    return _compile(function, parallel=False, fastmath=False)


def _compile(function: F, *, parallel: bool, fastmath: object) -> F:
    compiled: F = numba.njit(parallel=parallel, fastmath=fastmath, nogil=True, error_model="numpy")(function)
    kernel_cache.cache(compiled)
    return compiled


def set_num_threads(count: int) -> None:
    """Threads of every kernel and of torch, for the calling thread (both keep them per thread).

    A parallel kernel sets OpenMP's count, which is torch's too; so they are always set together.
    """
    if count > numba.config.NUMBA_NUM_THREADS:
        raise ConfigError(f"{count} threads on {numba.config.NUMBA_NUM_THREADS} cores", param="threads")
    numba.set_num_threads(count)
    torch.set_num_threads(count)


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """A pointer to elements of `like`'s type at an integer address."""
    signature = types.CPointer(like)(types.int64, like)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def take(typing_context: Any, counter: Any) -> Any:
    """The next number of a counter, int64, at this address, from which several threads take theirs."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        at = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", at, word(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 that has these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of_float(typing_context: Any, value: Any) -> Any:
    """The 32 bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of_floats(typing_context: Any, values: Any) -> Any:
    """The same memory as int32; numpy's `view` compiles the text of an error with it."""
    bits = values.copy(dtype=types.int32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        given = arrayobj.make_array(values)(context, builder, arguments[0])
        made = arrayobj.make_array(bits)(context, builder)
        arrayobj.populate_array(
            made,
            data=builder.bitcast(given.data, ir.IntType(32).as_pointer()),
            shape=given.shape,
            strides=given.strides,
            itemsize=given.itemsize,
            meminfo=given.meminfo,
            parent=given.parent,
        )
        return imputils.impl_ret_borrowed(context, builder, bits, made._getvalue())

    return bits(values), generate


def widen(stored: Any) -> Any:
    """A stored element as float32: float32 as it is, uint16 as the bits of a bfloat16."""
    raise TypeError("only inside a kernel")


@overload(widen, inline="always")  # type: ignore[untyped-decorator]
def _widen(stored: Any) -> Any:
    def from_bfloat16(stored: Any) -> Any:
        return float_of_bits(numba.uint32(numba.uint32(stored) << numba.uint32(16)))

    def as_it_is(stored: Any) -> Any:
        return stored

    return from_bfloat16 if stored == types.uint16 else as_it_is


def narrow(value: Any, like: Any) -> Any:
    """A float32 as an element of `like`'s type, rounded to nearest, ties to even; NaN stays NaN."""
    raise TypeError("only inside a kernel")


@inline
def _to_bfloat16(value: Any) -> Any:
    bits = bits_of_float(numba.float32(value))
    rounded = (bits + numba.uint32(0x7FFF) + ((bits >> numba.uint32(16)) & numba.uint32(1))) >> (
        numba.uint32(16)
    )
    return numba.uint16(numba.uint32(0x7FC0) if math.isnan(value) else rounded)


@overload(narrow, inline="always")  # type: ignore[untyped-decorator]
def _narrow(value: Any, like: Any) -> Any:
    def to_bfloat16(value: Any, like: Any) -> Any:
        return _to_bfloat16(value)

    def as_it_is(value: Any, like: Any) -> Any:
        return numba.float32(value)

    return to_bfloat16 if like == types.uint16 else as_it_is


@inline
def fast_exp(x: Any) -> Any:
    """exp of a float32 in [-87, 88] (clamped), relative error below 2e-7.

    Cody-Waite reduction to [-ln2/2, ln2/2] and the degree-6 minimax polynomial of Cephes' expf;
    plain arithmetic, so that LLVM vectorises it (there is no vector libm to rely on).
    """
    x = min(max(numba.float32(x), numba.float32(-87.0)), numba.float32(88.0))
    n = math.floor(x * numba.float32(1.44269504088896341) + numba.float32(0.5))
    n = numba.float32(n)
    r = x - n * numba.float32(0.693359375)
    r = r + n * numba.float32(2.12194440e-4)
    p = numba.float32(1.9875691500e-4)
    p = p * r + numba.float32(1.3981999507e-3)
    p = p * r + numba.float32(8.3334519073e-3)
    p = p * r + numba.float32(4.1665795894e-2)
    p = p * r + numba.float32(1.6666665459e-1)
    p = p * r + numba.float32(5.0000001201e-1)
    p = p * r * r + r + numba.float32(1.0)
    scale = float_of_bits(numba.uint32(numba.int32(n) + numba.int32(127)) << numba.uint32(23))
    return p * scale


def size_of(like: Any) -> Any:
    """Bytes of one element of `like`'s type."""
    raise TypeError("only inside a kernel")


@overload(size_of, inline="always")  # type: ignore[untyped-decorator]
def _size_of(like: Any) -> Any:
    def two(like: Any) -> Any:
        return 2

    def four(like: Any) -> Any:
        return 4

    return two if like == types.uint16 else four
