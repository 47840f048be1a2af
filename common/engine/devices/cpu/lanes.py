"""Loops of the attention kernels that are written in vectors, since LLVM leaves them in pieces by itself.

Owns the vector code, as functions that kernels call. Each handles a run of positions whose keys or values lie
at a fixed stride, for a few query heads at once, so that what is read is read once for all of them and sums
stay in registers.

Elements of a head are taken in *lanes*: of a bfloat16 row, whose pairs fill 32 bits, the even elements of up
to 16 pairs, then the odd ones; of a float32 row as they lie. `lane_of` says where an element comes.

A sum over positions adds one after the other, and one over a head's elements goes by a fixed tree, so that no
length of a run leaves a trace in the bits. Hence no reassociation here, except by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

LANES = 16  # of the widest vector; LLVM splits it where the processor has shorter ones
REGISTERS = 16  # vectors of sums that a loop may hold

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_CONTRACT = ("contract",)  # multiply and add in one operation: the same wherever it is done
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, -0.693359375, 2.12194440e-4
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)


def heads_together(group: int, head_dim: int, element_bytes: int) -> int:
    """How many query heads, a power of two, are worked on at once: less than twice as many as a group has,
    and as many as registers hold the sums of."""
    most = min(_width(head_dim, element_bytes), max(1, REGISTERS * LANES // head_dim))
    count = 1
    while count < group and 2 * count <= most:
        count *= 2
    return count


def _width(head_dim: int, element_bytes: int) -> int:
    return math.gcd(head_dim * element_bytes // 4, LANES)


def lane_of(element: Any, lanes: Any, like: Any) -> Any:
    """Where an element of a head comes among the lanes; `lanes` has a fourth of the head's length."""
    raise TypeError("only inside a kernel")


@overload(lane_of, inline="always")  # type: ignore[untyped-decorator]
def _lane_of(element: Any, lanes: Any, like: Any) -> Any:
    width = _width(4 * lanes.count, 2)

    def of_pairs(element: Any, lanes: Any, like: Any) -> Any:
        inside = element % (2 * width)
        return element - inside + inside % 2 * width + inside // 2

    def as_it_lies(element: Any, lanes: Any, like: Any) -> Any:
        return element

    return of_pairs if like == types.uint16 else as_it_lies


class VectorCode:
    """Emits operations on vectors of `width` floats."""

    def __init__(self, builder: Any, width: int) -> None:
        self.builder, self.width = builder, width
        self.floats, self.words = ir.VectorType(_FLOAT, width), ir.VectorType(_INT32, width)

    def load(self, base: Any, offset: int, of: Any, align: int = 4) -> Any:
        """`offset` in bytes."""
        loaded = self.builder.load(self._pointer(base, offset, of))
        loaded.align = align
        return loaded

    def store(self, value: Any, base: Any, offset: int = 0) -> None:
        self.builder.store(value, self._pointer(base, offset, value.type)).align = 4

    def _pointer(self, base: Any, offset: int, of: Any) -> Any:
        address = self.builder.add(base, _INT64(offset)) if offset else base
        return self.builder.inttoptr(address, ir.PointerType(of))

    def all(self, value: float) -> Any:
        return self.floats([float(np.float32(value))] * self.width)

    def words_of(self, value: int) -> Any:
        return self.words([value] * self.width)

    def spread(self, value: Any) -> Any:
        """A number in all lanes."""
        undefined = ir.VectorType(value.type, self.width)(ir.Undefined)
        first = self.builder.insert_element(undefined, value, _INT32(0))
        return self.builder.shuffle_vector(first, undefined, self.words_of(0))

    def times(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=_CONTRACT)

    def plus_product(self, a: Any, b: Any, total: Any) -> Any:
        return self.builder.fadd(self.times(a, b), total, flags=_CONTRACT)

    def row(self, base: Any, head_dim: int, like: Any) -> list[Any]:
        """The lanes of a head's row of elements."""
        if like != types.uint16:
            return [self.load(base, 4 * first, self.floats) for first in range(0, head_dim, self.width)]
        found = []
        for first in range(0, head_dim, 2 * self.width):
            found += self.halves(self.load(base, 2 * first, self.words, align=2))
        return found

    def halves(self, pairs: Any) -> list[Any]:
        """The first, and the second elements of pairs of bfloat16, as floats."""
        first = self.builder.shl(pairs, self.words_of(16))
        second = self.builder.and_(pairs, self.words_of(0xFFFF0000))
        return [self.builder.bitcast(half, self.floats) for half in (first, second)]

    def sums(self, vectors: Sequence[Any]) -> Any:
        """The sum of the lanes of each vector, as one vector; their number is a power of two."""
        vectors = list(vectors)
        width, count = self.width, len(vectors)
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self._neighbours(one, other, width) for one, other in pairs]
        while width > count:
            width //= 2
            vectors = [self._neighbours(vectors[0], vectors[0], width)]
        return vectors[0]

    def _neighbours(self, one: Any, other: Any, width: int) -> Any:
        """Sums of neighbouring lanes of `one`, then of `other`, the first `width` of them."""
        shape = ir.VectorType(_INT32, width)
        even, odd = (
            self.builder.shuffle_vector(one, other, shape([2 * lane + first for lane in range(width)]))
            for first in (0, 1)
        )
        return self.builder.fadd(even, odd)

    def larger(self, a: Any, b: Any) -> Any:
        """Of `a` where it is larger, else of `b`."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def exp(self, x: Any) -> Any:
        """As `numba_runtime.fast_exp`: NaN stays NaN."""
        least, most = self.all(-87.0), self.all(88.0)
        x = self.builder.select(self.builder.fcmp_ordered("<", x, least), least, x)
        x = self.builder.select(self.builder.fcmp_ordered(">", x, most), most, x)
        n = self.plus_product(x, self.all(_LOG2_E), self.all(0.5))
        n = self.call(f"llvm.floor.v{self.width}f32", n)
        r = self.plus_product(n, self.all(_LN2_HIGH), x)
        r = self.plus_product(n, self.all(_LN2_LOW), r)
        p = self.all(_POLYNOMIAL[0])
        for coefficient in _POLYNOMIAL[1:]:
            p = self.plus_product(p, r, self.all(coefficient))
        p = self.builder.fadd(self.plus_product(self.times(p, r), r, r), self.all(1.0))
        exponent = self.builder.add(self.builder.fptosi(n, self.words), self.words_of(127))
        scale = self.builder.bitcast(self.builder.shl(exponent, self.words_of(23)), self.floats)
        return self.builder.fmul(p, scale)

    def call(self, name: str, *values: Any) -> Any:
        """What a function of LLVM's gives, in floats."""
        function = self.builder.module.globals.get(name)
        if function is None:
            of = ir.FunctionType(self.floats, [value.type for value in values])
            function = ir.Function(self.builder.module, of, name)
        return self.builder.call(function, values)

    def repeat(
        self, count: Any, totals: Sequence[Any], body: Callable[[Any, list[Any]], list[Any]]
    ) -> list[Any]:
        """`totals = body(index, totals)` for each index below `count`; returns the last ones."""
        builder, before = self.builder, self.builder.block
        head, inside, after = (builder.function.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(_INT64)
        index.add_incoming(_INT64(0), before)
        carried = []
        for total in totals:
            carried.append(builder.phi(total.type))
            carried[-1].add_incoming(total, before)
        builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
        builder.position_at_end(inside)
        found = body(index, carried)
        index.add_incoming(builder.add(index, _INT64(1)), builder.block)
        for phi, value in zip(carried, found, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return carried

    def beyond(self, base: Any, index: Any, stride: int) -> Any:
        return self.builder.add(base, self.builder.mul(index, _INT64(stride)))


def _head(lanes: Any, like: Any) -> tuple[int, int]:
    """Length of a head, and width of its vectors."""
    head_dim = 4 * lanes.count
    return head_dim, _width(head_dim, 2 if like == types.uint16 else 4)


@intrinsic  # type: ignore[untyped-decorator]
def score_run(
    typing_context: Any,
    keys: Any,
    stride: Any,
    count: Any,
    queries: Any,
    out: Any,
    together: Any,
    lanes: Any,
    like: Any,
) -> Any:
    """float32 out[count, heads] = the products of `count` keys, `stride` bytes apart, with float32
    queries[heads, head_dim] in lanes. `together` and `lanes` are tuples with as many entries as there are
    heads, and a fourth of `head_dim`."""
    head_dim, width = _head(lanes, like)
    heads = together.count

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        key_at, stride, count, query_at, out_at = arguments[:5]
        code = VectorCode(builder, width)

        def one_key(index: Any, _: list[Any]) -> list[Any]:
            key = code.row(builder.add(key_at, builder.mul(index, stride)), head_dim, like)
            products = []
            for head in range(heads):
                total = None
                for place, part in enumerate(key):
                    query = code.load(query_at, 4 * (head * head_dim + place * width), code.floats)
                    total = (
                        code.times(query, part) if total is None else code.plus_product(query, part, total)
                    )
                products.append(total)
            code.store(code.sums(products), code.beyond(out_at, index, 4 * heads))
            return []

        code.repeat(count, [], one_key)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5, together, lanes, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def value_run(
    typing_context: Any,
    values: Any,
    stride: Any,
    count: Any,
    weights: Any,
    out: Any,
    together: Any,
    lanes: Any,
    like: Any,
) -> Any:
    """float32 out[heads, head_dim], in lanes, plus the sum of `count` values, `stride` bytes apart, with
    float32 weights[count, heads]. `together` and `lanes` as in `score_run`."""
    head_dim, width = _head(lanes, like)
    heads, parts = together.count, head_dim // width

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value_at, stride, count, weight_at, out_at = arguments[:5]
        code = VectorCode(builder, width)
        places = [4 * (head * head_dim + part * width) for head in range(heads) for part in range(parts)]

        def one_value(index: Any, totals: list[Any]) -> list[Any]:
            value = code.row(builder.add(value_at, builder.mul(index, stride)), head_dim, like)
            at, found = code.beyond(weight_at, index, 4 * heads), []
            for head in range(heads):
                weight = code.spread(code.load(at, 4 * head, _FLOAT))
                for part in range(parts):
                    found.append(code.plus_product(weight, value[part], totals[head * parts + part]))
            return found

        before = [code.load(out_at, place, code.floats) for place in places]
        for place, total in zip(places, code.repeat(count, before, one_value), strict=True):
            code.store(total, out_at, place)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5, together, lanes, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def peak_run(typing_context: Any, scores: Any, count: Any, peaks: Any) -> Any:
    """float32 peaks[16]: the largest of scores[count, 16]; NaN is passed over."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        score_at, count, peak_at = arguments
        code = VectorCode(builder, LANES)

        def one(index: Any, highest: list[Any]) -> list[Any]:
            row = code.load(code.beyond(score_at, index, 4 * LANES), 0, code.floats)
            return [code.larger(row, highest[0])]

        (highest,) = code.repeat(count, [code.all(-math.inf)], one)
        code.store(highest, peak_at)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def exp_run(typing_context: Any, scores: Any, count: Any, peaks: Any, sums: Any) -> Any:
    """float32 scores[count, 16] become exp(scores - peaks[16]), and sums[16] their sums."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        score_at, count, peak_at, sum_at = arguments
        code = VectorCode(builder, LANES)
        peak = code.load(peak_at, 0, code.floats)

        def one(index: Any, totals: list[Any]) -> list[Any]:
            at = code.beyond(score_at, index, 4 * LANES)
            weight = code.exp(builder.fsub(code.load(at, 0, code.floats), peak))
            code.store(weight, at)
            return [builder.fadd(totals[0], weight)]

        (total,) = code.repeat(count, [code.all(0.0)], one)
        code.store(total, sum_at)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), generate
