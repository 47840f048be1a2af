"""Attention out of the paged pool: one kernel for prompts, generated rows and drafts that are verified.

Owns the order of its arithmetic, which is a function of a row's position and window alone. Keys are taken in
spans of SPAN, aligned to absolute position, with a running softmax. In a span a row's scores, and its sum of
values, are products as `tiles.tile` makes them: step by step, where a step is a pair of elements, or of
positions, in bfloat16. Weights are rounded to the type of the values. What a row does not see is no part of
its sums: neither its neighbours in a tile nor the chunks of a prompt leave a trace in the bits, and NaN
reaches only those who see it. Rows of 8 bits are widened, which is exact, before anything is computed.

A *line* is a query head at a position. Those of the query heads that share keys and values are computed
together, so that what is read is read once for all.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import carray, prange

from common.engine.devices.cpu.attention_vectors import (
    LINE_WORDS,
    fetch,
    mask_pairs,
    multiply_run,
    pack_keys,
    pack_values,
    weigh,
)
from common.engine.devices.cpu.numba_runtime import (
    compiles_for,
    inline,
    kernel,
    narrow,
    pointer,
    size_of,
    take,
)
from common.engine.devices.cpu.scaled_rows import SCALE_BYTES, load_scaled, stored_size
from common.engine.devices.cpu.tiles import FRESH, GOING_ON, tile

SPAN = 128  # positions, whose keys and values stay in the cache while all lines of a tile pass over them
QUERY_TILE = 32  # positions per unit of work
FEW_ROWS = 8  # of a tile, below which reading takes longer than computing, and is asked for ahead
LOG2_E = 1.44269504088896341

_LOWEST = np.float32(-np.inf)
_FIRST, _SECOND = np.uint32(0xFFFF), np.uint32(0xFFFF0000)  # of a pair of positions


_VECTORS = 24 if compiles_for("avx512f") else 6  # of sums that registers hold


class Together(NamedTuple):
    """How many lines are computed at once, and how many vectors a block of columns has, as tuples with so
    many entries: registers hold the sums of all, and there are enough of them to go on with while each waits
    for its last step."""

    few: tuple[int, ...]  # lines of one position: a group of query heads, or an equal part of it
    many: tuple[int, ...]  # lines of several positions that see all of a span, a multiple of `few`
    columns: tuple[int, ...]


@functools.cache
def together(group: int, head_dim: int) -> Together:
    """`group`: query heads that share keys and values."""
    columns = 1 if _VECTORS < 24 else 4 if group <= 3 and head_dim % 64 == 0 else 2
    most = _VECTORS // columns
    few = -(-group // -(-group // most))
    several = max(1, min(most, 8) // few) if few == group else 1
    return Together((0,) * few, (0,) * (several * few), (0,) * columns)


@inline
def _locate(
    k_rows: Any,
    v_rows: Any,
    lowest: Any,
    end: Any,
    base: Any,
    nothing: Any,
    table: Any,
    block_size: Any,
    slab_bytes: Any,
    position_bytes: Any,
    k_at: Any,
    v_at: Any,
) -> Any:
    """Addresses of a span's keys and values from `lowest` to `end`, and of `nothing` around them."""
    position = base
    while position < base + SPAN:
        j = position - base
        if lowest <= position < end:
            block, offset = position // block_size, position % block_size
            run = min(block_size - offset, end - position, SPAN - j)
            start = numba.int64(table[block]) * slab_bytes + offset * position_bytes
            for i in range(run):
                k_rows[j + i] = k_at + start + i * position_bytes
                v_rows[j + i] = v_at + start + i * position_bytes
            position += run
        else:
            k_rows[j] = nothing
            v_rows[j] = nothing
            position += 1


@inline
def _widen(
    rows: Any, scales: Any, nothing: Any, first: Any, end: Any, out: Any, lanes: Any, form: Any, like: Any
) -> Any:
    """Of a span's rows that are stored in 8 bits, those at [first, end), in `like`'s type, at `out`; their
    addresses are there from now on. What lies at `nothing` is in that type already."""
    row_bytes = 4 * len(lanes) * size_of(like)
    for j in range(first, end):
        if rows[j] != nothing:
            at = out + j * row_bytes
            load_scaled(rows[j], scales[j], 4 * len(lanes), at, form, like)
            rows[j] = at


@inline
def _after(start: Any, size: Any) -> Any:
    """The next address, a multiple of 64 bytes further."""
    return start + (size + 63) // 64 * 64


@inline
def _add_values(
    weights: Any,
    values: Any,
    first: Any,
    last: Any,
    result: Any,
    result_bytes: Any,
    half: Any,
    lines: Any,
    columns: Any,
    pairs: Any,
    like: Any,
) -> Any:
    """result[lines] += weights[lines, first:last] times packed values. Half a pair goes by itself, with
    zeros in place of the value that is not seen."""
    block_bytes = 64 * len(columns)
    per_step = 4 // size_of(like)
    steps = SPAN // per_step
    whole, end = (first + per_step - 1) // per_step, last // per_step
    for block in range(result_bytes // block_bytes):
        out, values_at = result + block * block_bytes, values + block * steps * block_bytes
        for part in range(3):
            at, count = whole, end - whole
            v_at = values_at + at * block_bytes
            if part == 0:
                at, count = first // per_step, whole - first // per_step
                mask_pairs(values_at + at * block_bytes, half, _SECOND, columns)
                v_at = half
            elif part == 2:
                at, count = end, (last + per_step - 1) // per_step - max(end, whole)
                mask_pairs(values_at + at % steps * block_bytes, half, _FIRST, columns)
                v_at = half
            if count > 0:
                w_at = weights + at * 4
                tile(w_at, steps * 4, v_at, count, out, result_bytes, lines, columns, GOING_ON, pairs, like)


@inline
def _pass_over(
    query: Any,
    words: Any,
    keys: Any,
    values: Any,
    first: Any,
    last: Any,
    scale: Any,
    scores: Any,
    weights: Any,
    half: Any,
    state: Any,
    result: Any,
    result_bytes: Any,
    lines: Any,
    columns: Any,
    pairs: Any,
    like: Any,
) -> Any:
    """Take so many lines, which see [first, last) of a span, a span further."""
    block = 16 * len(columns)
    for at in range(first // block, (last + block - 1) // block):
        k_at, out = keys + at * words * block * 4, scores + at * block * 4
        tile(query, words * 4, k_at, words, out, SPAN * 4, lines, columns, FRESH, pairs, like)
    for line in range(len(lines)):
        score_at, weight_at = scores + line * SPAN * 4, weights + line * SPAN * size_of(like)
        state_at = state + line * LINE_WORDS * 4
        decay = weigh(score_at, first, last, np.float32(scale), state_at, weight_at, pairs, like)
        if decay != np.float32(1.0):
            multiply_run(result + line * result_bytes, result_bytes // 64, decay)
    _add_values(weights, values, first, last, result, result_bytes, half, lines, columns, pairs, like)


@inline
def _attend_tiles(
    counter_at: Any,
    scratch_at: Any,
    sizes: Any,
    queries: Any,
    row_stride: Any,
    out: Any,
    tables: Any,
    tiles: Any,
    num_tiles: Any,
    pool: Any,
    key_offset: Any,
    value_offset: Any,
    slab: Any,
    block_size: Any,
    heads: Any,
    kv_heads: Any,
    window: Any,
    scale: Any,
    few: Any,
    many: Any,
    columns: Any,
    lanes: Any,
    pairs: Any,
    key_scales: Any,
    value_scales: Any,
    form: Any,
    like: Any,
) -> Any:
    """What one worker does of `attend`: it takes a tile and a head of keys and values, until none is left."""
    group = heads // kv_heads
    parts = (group + len(few) - 1) // len(few)
    lines_of_row = parts * len(few)
    block = 16 * len(columns)
    head_dim = 4 * len(lanes)
    head_bytes = head_dim * size_of(like)
    words = head_bytes // 4
    stored_bytes = head_dim * stored_size(like, form)  # of a head in the pool
    result_bytes = (head_dim + block - 1) // block * block * 4
    per_step = 4 // size_of(like)
    steps = SPAN // per_step
    tile_of = carray(pointer(tiles, np.int32(0)), (num_tiles, 4))
    query_at = scratch_at
    result_at = _after(query_at, sizes[0])
    state_at = _after(result_at, sizes[1])
    keys_at = _after(state_at, sizes[2])
    values_at = _after(keys_at, sizes[3])
    scores_at = _after(values_at, sizes[4])
    weights_at = _after(scores_at, sizes[5])
    k_rows_at = _after(weights_at, sizes[6])
    v_rows_at = _after(k_rows_at, sizes[7])
    half_at = _after(v_rows_at, sizes[8])
    nothing_at = _after(half_at, sizes[9])
    k_scales_at = _after(nothing_at, sizes[10])
    v_scales_at = _after(k_scales_at, sizes[11])
    wide_at = _after(v_scales_at, sizes[12])
    result = carray(pointer(result_at, np.float32(0)), (sizes[1] // 4,))
    state = carray(pointer(state_at, np.float32(0)), (sizes[2] // (LINE_WORDS * 4), LINE_WORDS))
    k_rows = carray(pointer(k_rows_at, np.int64(0)), (SPAN,))
    v_rows = carray(pointer(v_rows_at, np.int64(0)), (SPAN,))
    k_scales = carray(pointer(k_scales_at, np.int64(0)), (SPAN,))
    v_scales = carray(pointer(v_scales_at, np.int64(0)), (SPAN,))
    unit = take(counter_at)
    while unit < num_tiles * kv_heads:
        # later tiles cost more: they are handed out first
        index, kv_head = num_tiles - 1 - unit // kv_heads, unit % kv_heads
        unit = take(counter_at)
        first_row, count = numba.int64(tile_of[index, 0]), numba.int64(tile_of[index, 1])
        start = numba.int64(tile_of[index, 2])
        end = start + count
        lowest = max(0, start - window + 1) if window > 0 else 0
        num_blocks = (end + block_size - 1) // block_size
        table_at = tables + numba.int64(tile_of[index, 3]) * 4
        table = carray(pointer(table_at, np.int32(0)), (num_blocks,))
        for row in range(count):
            q_at = queries + (first_row + row) * row_stride * size_of(like) + kv_head * group * head_bytes
            q = carray(pointer(q_at, like), (group * head_dim,))
            kept = carray(pointer(query_at + row * lines_of_row * head_bytes, like), (group * head_dim,))
            for i in range(group * head_dim):
                kept[i] = q[i]
        result[: count * lines_of_row * result_bytes // 4] = np.float32(0.0)
        state[: count * lines_of_row] = np.float32(0.0)
        state[: count * lines_of_row, 0] = _LOWEST
        own = pool + kv_head * stored_bytes
        own_scales = pool + kv_head * SCALE_BYTES
        for base in range(lowest // SPAN * SPAN, end, SPAN):
            _locate(
                k_rows,
                v_rows,
                lowest,
                end,
                base,
                nothing_at,
                table,
                block_size,
                slab,
                kv_heads * stored_bytes,
                own + key_offset,
                own + value_offset,
            )
            filled = (min(end - base, SPAN) + 15) // 16 * 16
            if len(form) > 0:
                _locate(
                    k_scales,
                    v_scales,
                    lowest,
                    end,
                    base,
                    nothing_at,
                    table,
                    block_size,
                    slab,
                    kv_heads * SCALE_BYTES,
                    own_scales + key_scales,
                    own_scales + value_scales,
                )
                first = max(lowest - base, 0)
                last = min(end - base, SPAN)
                _widen(k_rows, k_scales, nothing_at, first, last, wide_at, lanes, form, like)
                v_wide_at = wide_at + SPAN * head_bytes
                _widen(v_rows, v_scales, nothing_at, first, last, v_wide_at, lanes, form, like)
            for j in range(max(lowest - base, 0) // 16 * 16, filled, 16):
                if count <= FEW_ROWS and len(form) == 0:
                    for i in range(j, j + 16):
                        fetch(v_rows[i], lanes, like)
                    for i in range(j + 16, min(j + 32, filled)):
                        fetch(k_rows[i], lanes, like)
                at = keys_at + j // block * words * block * 4 + j % block * 4
                pack_keys(k_rows_at + j * 8, at, columns, lanes, like)
            for j in range(max(lowest - base, 0) // 16 * 16, filled, per_step):
                at = values_at + j // per_step * block * 4
                pack_values(v_rows[j], v_rows[j + per_step - 1], at, steps * block * 4, columns, lanes, like)
            row = 0
            while row < count:
                here = start + row
                line = row * lines_of_row
                several = len(many) // len(few)
                sees_all = here + 1 >= base + SPAN and (window <= 0 or here + several <= base + window)
                if several > 1 and row + several <= count and sees_all:
                    _pass_over(
                        query_at + line * head_bytes,
                        words,
                        keys_at,
                        values_at,
                        0,
                        SPAN,
                        scale,
                        scores_at,
                        weights_at,
                        half_at,
                        state_at + line * LINE_WORDS * 4,
                        result_at + line * result_bytes,
                        result_bytes,
                        many,
                        columns,
                        pairs,
                        like,
                    )
                    row += several
                    continue
                first = max(here + 1 - window - base, 0) if window > 0 else 0
                last = min(here + 1 - base, SPAN)
                if first < last:
                    for _part in range(parts):
                        _pass_over(
                            query_at + line * head_bytes,
                            words,
                            keys_at,
                            values_at,
                            first,
                            last,
                            scale,
                            scores_at,
                            weights_at,
                            half_at,
                            state_at + line * LINE_WORDS * 4,
                            result_at + line * result_bytes,
                            result_bytes,
                            few,
                            columns,
                            pairs,
                            like,
                        )
                        line += len(few)
                row += 1
        for row in range(count):
            y_at = out + ((first_row + row) * heads + kv_head * group) * head_bytes
            y = carray(pointer(y_at, like), (group, head_dim))
            for g in range(group):
                line = row * lines_of_row + g
                total = np.float32(0.0)
                for i in range(16, LINE_WORDS):
                    total += state[line, i]
                inverse = np.float32(1.0) / total
                for i in range(head_dim):
                    y[g, i] = narrow(result[line * result_bytes // 4 + i] * inverse, like)


@kernel
def attend(
    queries: Any,
    row_stride: Any,
    out: Any,
    tables: Any,
    tiles: Any,
    num_tiles: Any,
    pool: Any,
    key_offset: Any,
    value_offset: Any,
    slab: Any,
    block_size: Any,
    heads: Any,
    kv_heads: Any,
    window: Any,
    scale: Any,
    workers: Any,
    few: Any,
    many: Any,
    columns: Any,
    lanes: Any,
    pairs: Any,
    key_scales: Any,
    value_scales: Any,
    form: Any,
    like: Any,
) -> Any:
    """Causal attention of runs of consecutive positions: out[rows, heads * head_dim].

    tiles[num_tiles, 4] are (first row, number of rows, first position, where its sequence's blocks begin in
    `tables`). A row at position p reads positions (p - window, p]; all before it where `window` is 0. `slab`,
    `key_offset`, `value_offset` and, if `form` is not PLAIN, `key_scales` and `value_scales` count bytes.
    `scale` is for powers of two. `few`, `many`, `columns` as in `Together`; `lanes` has head_dim / 4 entries.
    """
    group = heads // kv_heads
    lines_of_row = (group + len(few) - 1) // len(few) * len(few)
    head_dim, block = 4 * len(lanes), 16 * len(columns)
    head_bytes = head_dim * size_of(like)
    result_bytes = (head_dim + block - 1) // block * block * 4
    steps = SPAN * size_of(like) // 4
    scaled = min(len(form), 1)
    tile_of = carray(pointer(tiles, np.int32(0)), (num_tiles, 4))
    most = 1
    for index in range(num_tiles):
        most = max(most, numba.int64(tile_of[index, 1]))
    lines = most * lines_of_row
    sizes = (  # of what a worker needs, in bytes
        lines * head_bytes,
        lines * result_bytes,
        lines * LINE_WORDS * 4,
        SPAN * head_bytes,
        steps * result_bytes,
        len(many) * SPAN * 4,
        len(many) * SPAN * 4,
        SPAN * 8,
        SPAN * 8,
        block * 4,
        head_bytes,
        scaled * SPAN * 8,
        scaled * SPAN * 8,
        scaled * 2 * SPAN * head_bytes,
    )
    total_bytes = 64
    for size in sizes:
        total_bytes += (size + 63) // 64 * 64
    memory = np.zeros(8 + workers * total_bytes // 8, np.int64)
    for worker in prange(workers):
        # Its address is asked for here and not before: numba gives an array back after its last use, and an
        # address is none.
        _attend_tiles(
            memory.ctypes.data,
            memory.ctypes.data + 64 + np.int64(worker) * total_bytes,
            sizes,
            queries,
            row_stride,
            out,
            tables,
            tiles,
            num_tiles,
            pool,
            key_offset,
            value_offset,
            slab,
            block_size,
            heads,
            kv_heads,
            window,
            scale,
            few,
            many,
            columns,
            lanes,
            pairs,
            key_scales,
            value_scales,
            form,
            like,
        )
