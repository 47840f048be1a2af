"""Small products with one order of summation, which products of matrices and attention are made of.

Owns the step of a sum, and `tile`: a few rows times a block of columns that lies step by step. A row's sum
adds one step after the other, a pair of bfloat16 products or a float32 product, from the first to the last,
however many rows or columns are computed at once: neither leaves a trace in the bits.

Where the processor has products of bfloat16 pairs (AVX512-BF16), they are used; elsewhere both halves of a
pair are widened. The two round differently: the processor's features are part of the numerics class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from common.engine.devices.cpu.numba_runtime import compiles_for
from common.engine.devices.cpu.vectors import LANES, BFloat, VectorCode

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
PAIR_PRODUCTS = (0,) * compiles_for("avx512bf16")  # as a type: empty where there are none
FRESH, GOING_ON = (0,), ()  # totals that begin at zero, and those that go on


class Sums:
    """Emits the steps of a sum: products of elements that `like` names, by pairs where they have 16 bits."""

    def __init__(self, code: VectorCode, pairs: Any, like: Any) -> None:
        self._code, self._of_pairs, self._has_products = code, like == types.uint16, pairs.count > 0

    def element(self) -> Any:
        """Type of what a row gives to one step."""
        return _INT32 if self._of_pairs else _FLOAT

    def vector(self) -> Any:
        return self._code.words if self._of_pairs else self._code.floats

    def plus(self, total: Any, a: Any, b: Any) -> Any:
        code = self._code
        if not self._of_pairs:
            return code.plus_product(a, b, total)
        if self._has_products:
            return self._pair_product(total, a, b)
        for one, other in zip(code.halves(a), code.halves(b), strict=True):
            total = code.plus_product(one, other, total)
        return total

    def _pair_product(self, total: Any, a: Any, b: Any) -> Any:
        code, pairs = self._code, ir.VectorType(BFloat(), 2 * LANES)
        a, b = (code.builder.bitcast(one, pairs) for one in (a, b))
        return code.call("llvm.x86.avx512bf16.dpbf16ps.512", total, a, b)


def add_products(
    code: VectorCode,
    sums: Sums,
    rows: Sequence[Any],
    columns: Sequence[Any],
    step_bytes: int,
    steps: Any,
    before: Sequence[Any],
    ahead: Sequence[Any] = (),
) -> list[Any]:
    """Emits `before`, sums of each row with each vector of columns, plus the products of so many steps.

    `rows` and `columns` are addresses; from a step to the next are a word, and `step_bytes`. What lies at the
    addresses `ahead` is brought into the caches, a line a step.
    """

    def step(index: Any, before: list[Any]) -> list[Any]:
        vectors = [code.load(code.beyond(start, index, step_bytes), 0, sums.vector()) for start in columns]
        for start in ahead:
            code.fetch(code.beyond(start, index, 64))
        after = []
        for row, start in enumerate(rows):
            element = code.spread(code.load(code.beyond(start, index, 4), 0, sums.element(), align=2))
            for place, vector in enumerate(vectors, row * len(vectors)):
                after.append(sums.plus(before[place], element, vector))
        return after

    return code.repeat(steps, before, step)


@intrinsic  # type: ignore[untyped-decorator]
def tile(
    typing_context: Any,
    x: Any,
    stride: Any,
    weight: Any,
    steps: Any,
    totals: Any,
    total_stride: Any,
    rows: Any,
    vectors: Any,
    fresh: Any,
    pairs: Any,
    like: Any,
) -> Any:
    """float32 totals[rows, 16 * vectors] += x[rows, steps] times a block's weight[steps, 16 * vectors].

    Rows of `x` and of `totals` are `stride` and `total_stride` bytes apart. `rows` and `vectors` are tuples
    with as many entries; `fresh` is FRESH where totals are zero before and need not be read.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_at, stride, weight_at, steps, total_at, total_stride = arguments[:6]
        code = VectorCode(builder)
        sums = Sums(code, pairs, like)
        count, wide = rows.count, vectors.count
        ours, outs = code.starts(x_at, stride, count), code.starts(total_at, total_stride, count)
        theirs = code.starts(weight_at, _INT64(64), wide)
        places = [(out, 64 * vector) for out in outs for vector in range(wide)]
        before = (
            [code.all(0.0)] * len(places)
            if fresh.count
            else [code.load(*place, code.floats) for place in places]
        )
        after = add_products(code, sums, ours, theirs, 64 * wide, steps, before)
        for place, total in zip(places, after, strict=True):
            code.store(total, *place)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 6, rows, vectors, fresh, pairs, like), generate
