"""LLVM's vectors for the loops of kernels that LLVM leaves in pieces by itself.

Owns what products and attention have in common: emitting loads, shuffles, sums and functions of floats. All
is done lane by lane in an order that is written here: nothing is reassociated, and a product with a sum is
one operation wherever the processor has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir

LANES = 16  # of the widest vector; LLVM splits it where the processor has shorter ones

_FLOAT, _INT16, _INT32, _INT64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_SHORTS = ir.VectorType(_INT16, LANES)
_CONTRACT = ("contract",)  # multiply and add in one operation: the same wherever it is done
_AS_WRITTEN = ("arcp",)  # of no effect but that numba leaves it alone: what has no flag, it lets be reordered
_POWERS_OF_TWO = (  # a minimax polynomial of 2**x on [-1/2, 1/2]: relative error below 8e-8
    1.327646680e-3,
    9.675541293e-3,
    5.550713290e-2,
    2.402211972e-1,
    6.931469671e-1,
    1.0,
)
_INTO_SECOND_CACHE = 2  # of LLVM's prefetch: what lies far apart would drive each other out of the first
_LEAST_EXPONENT = -126.0  # of a normal float32


class BFloat(ir.types.Type):  # type: ignore[misc]
    """What llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


class VectorCode:
    """Emits operations on vectors of 16 floats."""

    floats, words = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT32, LANES)

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def load(self, base: Any, offset: int, of: Any, align: int = 4) -> Any:
        """`offset` in bytes."""
        loaded = self.builder.load(self._pointer(base, offset, of))
        loaded.align = align
        return loaded

    def store(self, value: Any, base: Any, offset: int = 0, align: int = 4) -> None:
        self.builder.store(value, self._pointer(base, offset, value.type)).align = align

    def fetch(self, base: Any, offset: int = 0) -> None:
        """Bring a line of memory into the second cache, for it is read soon. Any address will do."""
        at = self._pointer(base, offset, ir.IntType(8))
        name, kinds = "llvm.prefetch.p0", [at.type, _INT32, _INT32, _INT32]
        function = self.builder.module.globals.get(name)
        if function is None:
            function = ir.Function(self.builder.module, ir.FunctionType(ir.VoidType(), kinds), name)
        self.builder.call(function, [at, _INT32(0), _INT32(_INTO_SECOND_CACHE), _INT32(1)])

    def _pointer(self, base: Any, offset: int, of: Any) -> Any:
        address = self.builder.add(base, _INT64(offset)) if offset else base
        return self.builder.inttoptr(address, ir.PointerType(of))

    def all(self, value: float) -> Any:
        return self.floats([float(np.float32(value))] * LANES)

    def words_of(self, value: int) -> Any:
        return self.words([value] * LANES)

    def elements(self, base: Any, offset: int, are_short: bool) -> Any:
        """16 elements in their order as floats: of bfloat16, or of float32."""
        if not are_short:
            return self.load(base, offset, self.floats)
        bits = self.builder.zext(self.load(base, offset, _SHORTS, align=2), self.words)
        return self.builder.bitcast(self.builder.shl(bits, self.words_of(16)), self.floats)

    def starts(self, base: Any, stride: Any, count: int, most: Any = None) -> list[Any]:
        """Addresses of rows that are `stride` bytes apart; beyond the first `most`, of the last of those."""
        found = []
        for row in range(count):
            index = _INT64(row)
            if most is not None:
                last = self.builder.sub(most, _INT64(1))
                index = self.builder.select(self.builder.icmp_signed("<", index, most), index, last)
            found.append(self.builder.add(base, self.builder.mul(stride, index)))
        return found

    def spread(self, value: Any) -> Any:
        """A number in all lanes."""
        undefined = ir.VectorType(value.type, LANES)(ir.Undefined)
        first = self.builder.insert_element(undefined, value, _INT32(0))
        return self.builder.shuffle_vector(first, undefined, self.words_of(0))

    def plus(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=_AS_WRITTEN)

    def minus(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b, flags=_AS_WRITTEN)

    def times(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=_AS_WRITTEN)

    def plus_product(self, a: Any, b: Any, total: Any) -> Any:
        return self.builder.fadd(self.builder.fmul(a, b, flags=_CONTRACT), total, flags=_CONTRACT)

    def halves(self, pairs: Any) -> list[Any]:
        """The first, and the second elements of pairs of bfloat16, as floats."""
        first = self.builder.shl(pairs, self.words_of(16))
        second = self.builder.and_(pairs, self.words_of(0xFFFF0000))
        return [self.builder.bitcast(half, self.floats) for half in (first, second)]

    def sums(self, vectors: Sequence[Any]) -> Any:
        """The sum of the lanes of each vector, as one vector; their number is a power of two."""
        vectors = list(vectors)
        width, count = LANES, len(vectors)
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self._neighbours(one, other, width) for one, other in pairs]
        while width > count:
            width //= 2
            vectors = [self._neighbours(vectors[0], vectors[0], width)]
        return vectors[0]

    def _neighbours(self, one: Any, other: Any, width: int) -> Any:
        """Sums of neighbouring lanes of `one`, then of `other`, the first `width` of them."""
        even, odd = (self.shuffle(one, other, range(first, 2 * width, 2)) for first in (0, 1))
        return self.plus(even, odd)

    def larger(self, a: Any, b: Any) -> Any:
        """Of `a` where it is larger, else of `b`."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def power_of_two(self, x: Any) -> Any:
        """2**x of numbers up to about 0: 0 where it is less than any normal number; NaN stays NaN."""
        builder = self.builder
        whole = self.call("llvm.nearbyint.v16f32", x)
        rest = self.minus(x, whole)
        power = self.all(_POWERS_OF_TWO[0])
        for coefficient in _POWERS_OF_TWO[1:]:
            power = self.plus_product(power, rest, self.all(coefficient))
        exponent = builder.shl(builder.fptosi(whole, self.words), self.words_of(23))
        scaled = builder.bitcast(builder.add(builder.bitcast(power, self.words), exponent), self.floats)
        is_small = builder.fcmp_ordered("<", x, self.all(_LEAST_EXPONENT))
        is_nan = builder.fcmp_unordered("uno", x, x)
        return builder.select(is_nan, x, builder.select(is_small, self.all(0.0), scaled))

    def bfloat16(self, x: Any, at_once: bool) -> Any:
        """Rounded to nearest, ties to even, as integers of 16 bits; NaN stays NaN. `at_once`: by
        AVX512-BF16."""
        builder, of = self.builder, _SHORTS
        if at_once:
            name, shape = "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(BFloat(), LANES)
            return builder.bitcast(self.call(name, x, gives=shape), of)
        bits = builder.bitcast(x, self.words)
        is_odd = builder.and_(builder.lshr(bits, self.words_of(16)), self.words_of(1))
        rounded = builder.add(builder.add(bits, is_odd), self.words_of(0x7FFF))
        is_nan = builder.fcmp_unordered("uno", x, x)
        upper = builder.lshr(builder.select(is_nan, self.words_of(0x7FC00000), rounded), self.words_of(16))
        return builder.trunc(upper, of)

    def shuffle(self, one: Any, other: Any, places: Sequence[int]) -> Any:
        """The lanes at these places of one vector and, further on, of the other."""
        return self.builder.shuffle_vector(one, other, ir.VectorType(_INT32, len(places))(list(places)))

    def transposed(self, rows: Sequence[Any]) -> list[Any]:
        """16 vectors of 16 words each, of which lane `i` of vector `j` was lane `j` of vector `i`."""
        pairs = self._interleaved(rows, 1, 1)
        fours = self._interleaved(pairs, 2, 2)  # each quarter: a column of four rows
        found: dict[int, Any] = {}
        for column in range(4):
            above = [self._quarters(fours[column], fours[4 + column], first) for first in (0, 1)]
            below = [self._quarters(fours[8 + column], fours[12 + column], first) for first in (0, 1)]
            for first in (0, 1):
                for second in (0, 1):
                    whole = self._quarters(above[first], below[first], second)
                    found[4 * first + 8 * second + column] = whole
        return [found[place] for place in range(LANES)]

    def _interleaved(self, rows: Sequence[Any], distance: int, words: int) -> list[Any]:
        """In each group of twice `distance` rows: one and the one `distance` further, so many words of each
        by turns, of the lower and then of the upper halves of their quarters."""
        found = []
        for group in range(0, len(rows), 2 * distance):
            for row in range(group, group + distance):
                for half in (0, 2):
                    places = []
                    for quarter in range(0, LANES, 4):
                        starts = range(quarter + half, quarter + half + 2, words)
                        turns = [place for start in starts for place in (start, LANES + start)]
                        places += [place + word for place in turns for word in range(words)]
                    found.append(self.shuffle(rows[row], rows[row + distance], places))
        return found

    def _quarters(self, one: Any, other: Any, first: int) -> Any:
        """Every second quarter of both."""
        starts = [4 * quarter for quarter in range(first, 8, 2)]
        return self.shuffle(one, other, [start + word for start in starts for word in range(4)])

    def call(self, name: str, *values: Any, gives: Any = None) -> Any:
        """What a function of LLVM's gives, in floats unless another type is named."""
        function = self.builder.module.globals.get(name)
        if function is None:
            of = ir.FunctionType(gives or self.floats, [value.type for value in values])
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
