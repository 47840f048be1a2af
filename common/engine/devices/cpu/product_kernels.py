"""Products of our own, of which every row is summed in one order, however many rows there are.

Owns how a weight lies for them, and two kernels: `multiply` of a weight that is packed once, and
`multiply_rows` of one that stays readable by rows (a head on the embedding). A row's sum adds one pair of
bfloat16 products after the other, or one float32 product, from the first column to the last (`multiply`), or
in 16 lanes that are added up by a fixed tree (`multiply_rows`). So nothing has to be filled up to a number of
rows, and a step may hold any.

A packed weight `[out, in]` is `[out / block, in / 2, block]` pairs of bfloat16, or `[out / block, in, block]`
float32, filled up with zeros: a block's columns of a step of the sum lie side by side.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, prange, types
from numba.extending import intrinsic
from torch import Tensor

from common.engine.devices.cpu.numba_runtime import compiles_for, kernel, narrow, pointer, size_of, widen
from common.engine.devices.cpu.tiles import Sums, tile
from common.engine.devices.cpu.vectors import LANES, VectorCode

_INT64 = ir.IntType(64)
VECTORS = 4 if compiles_for("avx512f") else 1  # of 16 columns in a block: what registers hold with 6 rows
BLOCK = LANES * VECTORS
COLUMNS = (0,) * VECTORS
SIX, FOUR, TWO, ONE = (0,) * 6, (0,) * 4, (0,) * 2, (0,)  # rows at once
_AT_ONCE = 16  # blocks that are packed
ROWS_OF_A_UNIT = 36  # of a product: a multiple of six, whose part of `x` stays in the cache


def pack(weight: Tensor) -> Tensor:
    """`[out, in]` as `multiply` wants it, in words `[blocks, steps, BLOCK]` of 32 bits. A few blocks at a
    time, so that no other copy of a large weight is made."""
    out_features, in_features = weight.shape
    together = 4 // weight.itemsize
    steps, blocks = -(-in_features // together), -(-out_features // BLOCK)
    packed = torch.empty(blocks, steps, BLOCK, dtype=torch.int32)
    filled = torch.zeros(min(blocks, _AT_ONCE) * BLOCK, steps * together, dtype=weight.dtype)
    words = filled.view(torch.int32).view(-1, BLOCK, steps).transpose(1, 2)
    parts = zip(torch.split(packed, _AT_ONCE), torch.split(weight, _AT_ONCE * BLOCK), strict=True)
    for some, rows in parts:
        filled[: len(rows), :in_features] = rows
        filled[len(rows) :] = 0
        some.copy_(words[: len(some)])
    return packed


@kernel
def multiply(
    x: Any,
    weight: Any,
    bias: Any,
    out: Any,
    rows: Any,
    steps: Any,
    columns: Any,
    six: Any,
    four: Any,
    two: Any,
    one: Any,
    vectors: Any,
    fresh: Any,
    pairs: Any,
    like: Any,
) -> Any:
    """out[rows, columns] = x[rows, 4 * steps bytes] times the packed weight, plus `bias` (0 for none)."""
    block = 16 * len(vectors)
    blocks = (columns + block - 1) // block
    parts = (rows + ROWS_OF_A_UNIT - 1) // ROWS_OF_A_UNIT
    y = carray(pointer(out, like), (rows, columns))
    for unit in prange(blocks * parts):
        first, start = unit // parts * block, unit % parts * ROWS_OF_A_UNIT
        count = min(block, columns - first)
        w_at = weight + numba.int64(unit // parts) * steps * block * 4
        totals = np.empty((len(six), 16 * len(vectors)), np.float32)
        totals_at = totals.ctypes.data
        row, end = start, min(rows, start + ROWS_OF_A_UNIT)
        while row < end:
            x_at, stride = x + row * steps * 4, steps * 4
            if end - row >= 6:
                tile(x_at, stride, w_at, steps, totals_at, block * 4, six, vectors, fresh, pairs, like)
                done = 6
            elif end - row >= 4:
                tile(x_at, stride, w_at, steps, totals_at, block * 4, four, vectors, fresh, pairs, like)
                done = 4
            elif end - row >= 2:
                tile(x_at, stride, w_at, steps, totals_at, block * 4, two, vectors, fresh, pairs, like)
                done = 2
            else:
                tile(x_at, stride, w_at, steps, totals_at, block * 4, one, vectors, fresh, pairs, like)
                done = 1
            if bias != 0:
                b = carray(pointer(bias + first * size_of(like), like), (count,))
                for i in range(done):
                    for j in range(count):
                        totals[i, j] += widen(b[j])
            for i in range(done):
                for j in range(count):
                    y[row + i, first + j] = narrow(totals[i, j], like)
            row += done


@intrinsic  # type: ignore[untyped-decorator]
def dot_tile(
    typing_context: Any,
    x: Any,
    weight: Any,
    stride: Any,
    vectors: Any,
    totals: Any,
    rows: Any,
    columns: Any,
    pairs: Any,
    like: Any,
) -> Any:
    """float32 totals[rows, columns] = the products of rows of `x` and of `weight`.

    Each is of `vectors` vectors of 64 bytes, and they are `stride` bytes apart. The product of the two
    numbers is a power of two, of 16 at most.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_at, weight_at, stride, vectors, total_at = arguments[:5]
        code = VectorCode(builder)
        sums = Sums(code, pairs, like)
        ours = [builder.add(x_at, builder.mul(stride, _INT64(row))) for row in range(rows.count)]
        theirs = [builder.add(weight_at, builder.mul(stride, _INT64(one))) for one in range(columns.count)]

        def step(index: Any, before: list[Any]) -> list[Any]:
            x, w = (
                [code.load(code.beyond(start, index, 64), 0, sums.vector(), align=2) for start in starts]
                for starts in (ours, theirs)
            )
            pairs_of = [(one, other) for one in x for other in w]
            return [sums.plus(total, *pair) for total, pair in zip(before, pairs_of, strict=True)]

        zeros = [code.all(0.0)] * (rows.count * columns.count)
        code.store(code.sums(code.repeat(vectors, zeros, step)), total_at)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5, rows, columns, pairs, like), generate


@kernel
def multiply_rows(
    x: Any,
    weight: Any,
    out: Any,
    rows: Any,
    width: Any,
    columns: Any,
    four: Any,
    one: Any,
    pairs: Any,
    like: Any,
) -> Any:
    """out[rows, columns] = x[rows, width] times weight[columns, width] as it lies.

    What is left of a row after whole vectors is added one by one.
    """
    whole = 64 // size_of(like)
    vectors = width // whole
    stride = width * size_of(like)
    xs = carray(pointer(x, like), (rows, width))
    ws = carray(pointer(weight, like), (columns, width))
    y = carray(pointer(out, like), (rows, columns))
    for group in prange((columns + 3) // 4):
        first = group * 4
        count = min(4, columns - first)
        totals = np.empty((4, 4), np.float32)
        for row in range(0, rows, 4):
            taken = min(4, rows - row)
            if taken == 4 and count == 4:
                tile_at = totals.ctypes.data
                dot_tile(
                    x + row * stride,
                    weight + first * stride,
                    stride,
                    vectors,
                    tile_at,
                    four,
                    four,
                    pairs,
                    like,
                )
            else:
                for i in range(taken):
                    for j in range(count):
                        x_at, w_at = x + (row + i) * stride, weight + (first + j) * stride
                        tile_at = totals.ctypes.data + (4 * i + j) * 4
                        dot_tile(x_at, w_at, stride, vectors, tile_at, one, one, pairs, like)
            for i in range(taken):
                for j in range(count):
                    total = totals[i, j]
                    for at in range(vectors * whole, width):
                        total += widen(xs[row + i, at]) * widen(ws[first + j, at])
                    y[row + i, first + j] = narrow(total, like)
