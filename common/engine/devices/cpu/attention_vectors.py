"""The loops of attention between its two products, written in vectors.

Owns how keys and values of a span lie for `tile`, and the softmax of one line of scores.

A span's keys are packed as blocks of columns: step by step (a word of each key, two bfloat16 or one float32),
a block's keys side by side. Its values are packed as blocks of elements: step by step (a pair of positions of
bfloat16, or one position of float32), a block's elements side by side. `lanes` is a tuple with a fourth of a
head's length, `columns` one with as many entries as a block has vectors.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from common.engine.devices.cpu.vectors import LANES, VectorCode

_FLOAT, _INT16, _INT32, _INT64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
LINE_WORDS = 32  # of the state of a line: its highest score, 15 unused, 16 sums of weights
_SUMS_AT = 64  # bytes


def _element_bytes(like: Any) -> int:
    return 2 if like == types.uint16 else 4


@intrinsic  # type: ignore[untyped-decorator]
def fetch(typing_context: Any, row: Any, lanes: Any, like: Any) -> Any:
    """Ask for a head's row of elements, which will be read soon."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = VectorCode(builder)
        for offset in range(0, 4 * lanes.count * _element_bytes(like), 64):
            code.fetch(arguments[0], offset)
        return context.get_dummy_value()

    return types.void(types.int64, lanes, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def pack_keys(typing_context: Any, rows: Any, out: Any, columns: Any, lanes: Any, like: Any) -> Any:
    """Pack 16 keys, whose addresses are int64 rows[16], as 16 columns of a block whose first is at `out`."""
    words = 4 * lanes.count * _element_bytes(like) // 4
    step = 64 * columns.count

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows_at, out_at = arguments[:2]
        code = VectorCode(builder)
        starts = [code.load(rows_at, 8 * key, _INT64, align=8) for key in range(LANES)]
        for first in range(0, words, LANES):
            count = min(LANES, words - first)
            of, filled = ir.VectorType(_INT32, count), [min(word, count - 1) for word in range(LANES)]
            keys = [code.load(start, 4 * first, of, align=2) for start in starts]
            if count < LANES:
                keys = [code.shuffle(key, key, filled) for key in keys]
            for word, column in enumerate(code.transposed(keys)[:count]):
                code.store(column, out_at, step * (first + word))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, columns, lanes, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def pack_values(
    typing_context: Any, one: Any, other: Any, out: Any, block_bytes: Any, columns: Any, lanes: Any, like: Any
) -> Any:
    """Pack the rows of a pair of positions as one step; of float32 the row at `one` alone. `out` is in the
    first block; blocks are `block_bytes` apart."""
    head_dim, block = 4 * lanes.count, LANES * columns.count

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one_at, other_at, out_at, block_bytes = arguments[:4]
        code = VectorCode(builder)

        def place(element: int) -> tuple[Any, int]:
            return builder.add(out_at, builder.mul(block_bytes, _INT64(element // block))), element % block

        for first in range(0, head_dim, 2 * LANES):
            count = min(2 * LANES, head_dim - first)
            if like == types.uint16:
                of = ir.VectorType(_INT16, count)
                a, b = (code.load(row, 2 * first, of, align=2) for row in (one_at, other_at))
            for part in range(0, count, LANES):
                wide = min(LANES, count - part)
                if like == types.uint16:
                    turns = [place for at in range(part, part + wide) for place in (at, count + at)]
                    word = builder.bitcast(code.shuffle(a, b, turns), ir.VectorType(_INT32, wide))
                else:
                    word = code.load(one_at, 4 * (first + part), ir.VectorType(_INT32, wide))
                at, column = place(first + part)
                code.store(word, at, 4 * column)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4, columns, lanes, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def mask_pairs(typing_context: Any, step: Any, out: Any, mask: Any, columns: Any) -> Any:
    """out[block]: a step of a block of packed values, of which `mask` leaves one position of each pair."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        step_at, out_at, mask = arguments[:3]
        code = VectorCode(builder)
        mask = code.spread(mask)
        for offset in range(0, 64 * columns.count, 64):
            code.store(builder.and_(code.load(step_at, offset, code.words), mask), out_at, offset)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint32, columns), generate


@intrinsic  # type: ignore[untyped-decorator]
def weigh(
    typing_context: Any,
    scores: Any,
    first: Any,
    last: Any,
    scale: Any,
    state: Any,
    weights: Any,
    pairs: Any,
    like: Any,
) -> Any:
    """A step of the running softmax of one line (Dao et al., arXiv:2205.14135, algorithm 1): weights, in
    elements of `like`'s type, 2**(scale * (scores[first:last] - the highest so far)), 0 for others of their
    vectors. Returns what everything before has to be multiplied by.

    `state` is that of the line, LINE_WORDS float32. NaN is passed over where the highest is sought, and is a
    weight of NaN.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        score_at, first, last, scale, state_at, weight_at = arguments[:6]
        code = VectorCode(builder)
        begin = builder.lshr(first, _INT64(4))
        count = builder.sub(builder.lshr(builder.add(last, _INT64(LANES - 1)), _INT64(4)), begin)
        score_at = builder.add(score_at, builder.mul(begin, _INT64(64)))
        weight_bytes = LANES * _element_bytes(like)
        weight_at = builder.add(weight_at, builder.mul(begin, _INT64(weight_bytes)))
        lowest, scale = code.all(-math.inf), code.spread(scale)
        from_here, to_here = (
            code.spread(builder.trunc(builder.sub(end, builder.mul(begin, _INT64(LANES))), _INT32))
            for end in (first, last)
        )
        lane = code.words(list(range(LANES)))

        def peak_of(index: Any, highest: list[Any]) -> list[Any]:
            at = code.beyond(score_at, index, 64)
            here = builder.add(lane, code.spread(builder.trunc(builder.mul(index, _INT64(LANES)), _INT32)))
            is_seen = builder.and_(
                builder.icmp_signed(">=", here, from_here), builder.icmp_signed("<", here, to_here)
            )
            score = builder.select(is_seen, code.load(at, 0, code.floats), lowest)
            code.store(score, at)
            return [code.larger(score, highest[0])]

        (peak,) = code.repeat(count, [lowest], peak_of)
        for distance in (8, 4, 2, 1):
            turned = code.shuffle(peak, peak, [(place + distance) % LANES for place in range(LANES)])
            peak = code.larger(turned, peak)
        before = code.spread(code.load(state_at, 0, _FLOAT))
        peak = code.larger(peak, before)
        decay = code.power_of_two(code.times(code.minus(before, peak), scale))
        decay = builder.select(builder.fcmp_ordered("==", before, lowest), code.all(0.0), decay)

        def weight_of(index: Any, totals: list[Any]) -> list[Any]:
            score = code.load(code.beyond(score_at, index, 64), 0, code.floats)
            weight = code.power_of_two(code.times(code.minus(score, peak), scale))
            stored = code.bfloat16(weight, pairs.count > 0) if like == types.uint16 else weight
            code.store(stored, code.beyond(weight_at, index, weight_bytes))
            return [code.plus(totals[0], weight)]

        total = code.times(code.load(state_at, _SUMS_AT, code.floats), decay)
        (total,) = code.repeat(count, [total], weight_of)
        code.store(peak, state_at)
        code.store(total, state_at, _SUMS_AT)
        return builder.extract_element(decay, _INT32(0))

    numbers = (types.int64, types.int64, types.int64, types.float32, types.int64, types.int64)
    return types.float32(*numbers, pairs, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply_run(typing_context: Any, numbers: Any, vectors: Any, factor: Any) -> Any:
    """float32 numbers[16 * vectors] *= factor."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at, vectors, factor = arguments
        code = VectorCode(builder)
        factor = code.spread(factor)

        def one(index: Any, _: list[Any]) -> list[Any]:
            here = code.beyond(at, index, 64)
            code.store(code.times(code.load(here, 0, code.floats), factor), here)
            return []

        code.repeat(vectors, [], one)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate
