"""Products of our own, of which every row is summed in one order, however many rows there are.

Owns how a weight lies for them, and two kernels: `multiply` of a weight that is packed once, and
`multiply_rows` of one that stays readable by rows (a head on the embedding). A row's sum adds one pair of
bfloat16 products after the other, or one float32 product, from the first column to the last (`multiply`), or
in 16 lanes that are added up by a fixed tree (`multiply_rows`). So nothing has to be filled up to a number of
rows, and a step may hold any.

A packed weight `[out, in]` is `[out / 16, in / 2, 16]` pairs of bfloat16, or `[out / 16, in, 16]` float32,
filled up with zeros to whole blocks of columns. A core reads as many places of memory at once as a block has
vectors, for one place alone is slower. While rows are computed, what comes next is brought into the caches, a
line at a time: otherwise the first rows of a block wait for memory, and memory waits during the others.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, prange, types
from numba.extending import intrinsic
from numba.np import arrayobj
from torch import Tensor

from common.engine.devices.cpu.numba_runtime import (
    compiles_for,
    inline,
    kernel,
    narrow,
    pointer,
    size_of,
    widen,
)
from common.engine.devices.cpu.tiles import Sums, add_products
from common.engine.devices.cpu.vectors import LANES, VectorCode

_INT64 = ir.IntType(64)
VECTORS = 4 if compiles_for("avx512f") else 1  # of 16 columns in a block: what registers hold with 6 rows
BLOCK = LANES * VECTORS
COLUMNS = (0,) * VECTORS
SIX, FOUR, TWO, ONE = (0,) * 6, (0,) * 4, (0,) * 2, (0,)  # rows at once
_AT_ONCE = 16  # blocks that are packed
CHUNK = 128  # steps of a block that all rows of a unit go through while they are in the nearest caches
ROWS_OF_A_UNIT = 36  # of a product: a multiple of six, whose part of `x` stays in the cache


def pack(weight: Tensor) -> Tensor:
    """`[out, in]` as `multiply` wants it, in words `[blocks * VECTORS, steps, LANES]` of 32 bits. A few
    blocks at a time, so that no other copy of a large weight is made."""
    out_features, in_features = weight.shape
    together = 4 // weight.itemsize
    steps, blocks = -(-in_features // together), -(-out_features // BLOCK)
    packed = torch.empty(blocks * VECTORS, steps, LANES, dtype=torch.int32)
    filled = torch.zeros(min(blocks, _AT_ONCE) * BLOCK, steps * together, dtype=weight.dtype)
    words = filled.view(torch.int32).view(-1, LANES, steps).transpose(1, 2)
    parts = zip(torch.split(packed, _AT_ONCE * VECTORS), torch.split(weight, _AT_ONCE * BLOCK), strict=True)
    for some, rows in parts:
        filled[: len(rows), :in_features] = rows
        filled[len(rows) :] = 0
        some.copy_(words[: len(some)])
    return packed


@intrinsic  # type: ignore[untyped-decorator]
def block_tile(
    typing_context: Any,
    x: Any,
    x_stride: Any,
    weight: Any,
    stride: Any,
    steps: Any,
    totals: Any,
    ahead: Any,
    rows: Any,
    vectors: Any,
    pairs: Any,
    like: Any,
) -> Any:
    """float32 totals[rows, 16 * vectors] += x[rows, steps] times a block's weight[vectors, steps, 16].

    Rows of `x` are `x_stride` bytes apart, and vectors of the weight `stride`. A piece of a weight at `ahead`
    that is as large is brought into the caches. `rows` and `vectors` are tuples with as many entries.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_at, x_stride, weight_at, stride, steps, total_at, ahead = arguments[:7]
        code = VectorCode(builder)
        sums = Sums(code, pairs, like)
        count, wide = rows.count, vectors.count
        ours = code.starts(x_at, x_stride, count)
        theirs = code.starts(weight_at, stride, wide)
        fetched = code.starts(ahead, stride, wide)
        places = [64 * place for place in range(count * wide)]
        before = [code.load(total_at, place, code.floats) for place in places]
        after = add_products(code, sums, ours, theirs, 64, steps, before, fetched)
        for place, total in zip(places, after, strict=True):
            code.store(total, total_at, place)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 7, rows, vectors, pairs, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def finish(
    typing_context: Any, totals: Any, rows: Any, bias: Any, out: Any, stride: Any, vectors: Any, like: Any
) -> Any:
    """out[rows, 16 * vectors], whose rows are `stride` bytes apart, = float32 totals of the same shape, plus
    `bias` (0 for none).

    It is given the array itself: numba gives its memory back after the last use, and an address is none.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, bias_at, out_at, stride = arguments[1:5]
        total_at = builder.ptrtoint(arrayobj.make_array(totals)(context, builder, arguments[0]).data, _INT64)
        code = VectorCode(builder)
        is_short = like == types.uint16
        wide, size = vectors.count, LANES * (2 if is_short else 4)

        def row(index: Any, biases: list[Any]) -> list[Any]:
            at = code.beyond(total_at, index, 64 * wide)
            y_at = builder.add(out_at, builder.mul(index, stride))
            for vector in range(wide):
                total = code.load(at, 64 * vector, code.floats)
                if biases:
                    total = code.plus(total, biases[vector])
                stored = code.bfloat16(total, at_once=False) if is_short else total
                code.store(stored, y_at, size * vector, align=2)
            return []

        with builder.if_else(builder.icmp_signed("!=", bias_at, _INT64(0))) as (biased, plain):
            with biased:
                biases = [code.elements(bias_at, size * vector, is_short) for vector in range(wide)]
                code.repeat(rows, [], lambda index, _: row(index, biases))
            with plain:
                code.repeat(rows, [], lambda index, _: row(index, []))
        return context.get_dummy_value()

    return types.void(totals, *(types.int64,) * 4, vectors, like), generate


@inline
def finish_some(totals: Any, rows: Any, columns: Any, bias: Any, out: Any, stride: Any, like: Any) -> Any:
    """As `finish`, for the first `columns` of float32 totals[rows, any]; `stride` counts elements."""
    y = carray(pointer(out, like), (rows, stride))
    b = carray(pointer(bias, like), (columns,))
    for i in range(rows):
        for j in range(columns):
            total = totals[i, j]
            if bias != 0:
                total += widen(b[j])
            y[i, j] = narrow(total, like)


@kernel
def multiply(
    x: Any, weight: Any, bias: Any, out: Any, rows: Any, steps: Any, columns: Any, pairs: Any, like: Any
) -> Any:
    """out[rows, columns] = x[rows, 4 * steps bytes] times the packed weight, plus `bias` (0 for none)."""
    size = size_of(like)
    blocks = (columns + BLOCK - 1) // BLOCK
    parts = (rows + ROWS_OF_A_UNIT - 1) // ROWS_OF_A_UNIT
    for unit in prange(blocks * parts):
        first, start = unit // parts * BLOCK, unit % parts * ROWS_OF_A_UNIT
        end = min(rows, start + ROWS_OF_A_UNIT)
        block_at = weight + numba.int64(unit // parts) * steps * BLOCK * 4
        totals = np.zeros((end - start, BLOCK), np.float32)
        for step in range(0, steps, CHUNK):
            taken = min(CHUNK, steps - step)
            w_at = block_at + step * 64
            ahead = w_at + taken * 64 if step + taken < steps else block_at + steps * BLOCK * 4
            row = start
            while row < end:
                x_at, stride, apart = x + (row * steps + step) * 4, steps * 4, steps * 64
                t_at = totals.ctypes.data + (row - start) * BLOCK * 4
                if end - row >= 6:
                    block_tile(x_at, stride, w_at, apart, taken, t_at, ahead, SIX, COLUMNS, pairs, like)
                    row += 6
                elif end - row >= 4:
                    block_tile(x_at, stride, w_at, apart, taken, t_at, ahead, FOUR, COLUMNS, pairs, like)
                    row += 4
                elif end - row >= 2:
                    block_tile(x_at, stride, w_at, apart, taken, t_at, ahead, TWO, COLUMNS, pairs, like)
                    row += 2
                else:
                    block_tile(x_at, stride, w_at, apart, taken, t_at, ahead, ONE, COLUMNS, pairs, like)
                    row += 1
        b_at = bias + first * size if bias != 0 else 0
        y_at = out + (start * columns + first) * size
        if columns - first >= BLOCK:
            finish(totals, end - start, b_at, y_at, columns * size, COLUMNS, like)
        else:
            finish_some(totals, end - start, columns - first, b_at, y_at, columns, like)


@intrinsic  # type: ignore[untyped-decorator]
def dot_tile(
    typing_context: Any,
    x: Any,
    weight: Any,
    stride: Any,
    most: Any,
    vectors: Any,
    totals: Any,
    ahead: Any,
    rows: Any,
    columns: Any,
    pairs: Any,
    like: Any,
) -> Any:
    """float32 totals[rows, columns], whose rows are 64 bytes apart, = the products of rows of `x` and of
    `weight`; where there are only `most` rows of the weight, with the last of them for those that lack.

    Each is of `vectors` vectors of 64 bytes, and they are `stride` bytes apart. Rows of a weight at `ahead`
    are brought into the caches: as many as `columns` for one row, half as many for several. The product of
    the two numbers is a power of two, of 16 at most.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_at, weight_at, stride, most, vectors, total_at, ahead = arguments[:7]
        code = VectorCode(builder)
        sums = Sums(code, pairs, like)
        ours = code.starts(x_at, stride, rows.count)
        theirs = code.starts(weight_at, stride, columns.count, most)
        fetched = code.starts(ahead, stride, columns.count // min(2, rows.count))

        def step(index: Any, before: list[Any]) -> list[Any]:
            x, w = (
                [code.load(code.beyond(start, index, 64), 0, sums.vector(), align=2) for start in starts]
                for starts in (ours, theirs)
            )
            for start in fetched:
                code.fetch(code.beyond(start, index, 64))
            pairs_of = [(one, other) for one in x for other in w]
            return [sums.plus(total, *pair) for total, pair in zip(before, pairs_of, strict=True)]

        zeros = [code.all(0.0)] * (rows.count * columns.count)
        found = code.sums(code.repeat(vectors, zeros, step))
        for row in range(rows.count):
            first = row * columns.count
            code.store(code.shuffle(found, found, range(first, first + columns.count)), total_at, 64 * row)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 7, rows, columns, pairs, like), generate


@kernel
def multiply_rows(
    x: Any, weight: Any, out: Any, rows: Any, width: Any, columns: Any, pairs: Any, like: Any
) -> Any:
    """out[rows, columns] = x[rows, width] times weight[columns, width] as it lies.

    What is left of a row after whole vectors is added one by one.
    """
    size = size_of(like)
    whole = 64 // size
    vectors = width // whole
    stride = width * size
    xs = carray(pointer(x, like), (rows, width))
    ws = carray(pointer(weight, like), (columns, width))
    parts = (rows + ROWS_OF_A_UNIT - 1) // ROWS_OF_A_UNIT
    for unit in prange((columns + 15) // 16 * parts):
        first, start = unit // parts * 16, unit % parts * ROWS_OF_A_UNIT
        end, count = min(rows, start + ROWS_OF_A_UNIT), min(16, columns - first)
        totals = np.empty((end - start, 16), np.float32)
        for column in range(0, count, 4):
            w_at = weight + (first + column) * stride
            most = count - column
            row = start
            while row < end:
                x_at = x + row * stride
                t_at = totals.ctypes.data + ((row - start) * 16 + column) * 4
                ahead = w_at + 8 * stride
                if end - start >= 8 and end - row >= 4:
                    ahead += (row - start) % 8 // 2 * stride  # each of two brings half the columns
                    dot_tile(x_at, w_at, stride, most, vectors, t_at, ahead, FOUR, FOUR, pairs, like)
                    row += 4
                else:
                    dot_tile(x_at, w_at, stride, most, vectors, t_at, ahead, ONE, FOUR, pairs, like)
                    row += 1
        for at in range(vectors * whole, width):
            for i in range(end - start):
                for j in range(count):
                    totals[i, j] += widen(xs[start + i, at]) * widen(ws[first + j, at])
        y_at = out + (start * columns + first) * size
        if count == 16:
            finish(totals, end - start, 0, y_at, columns * size, ONE, like)
        else:
            finish_some(totals, end - start, count, 0, y_at, columns, like)
