"""Attention of generated rows: splits side by side, as many programs as run at once, then joined in order.

Owns which program computes what, of which the sum knows nothing (kernels/attention.py). All that depends on a
step's sequences is read from the device: a captured graph serves every step of its size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.engine.devices.cuda.kernels.attention import attend, attended, join, nothing, queries

RECORD = tl.constexpr(8)  # numbers of an item of the work list


@triton.jit(do_not_specialize=["num_tiles", "num_rows", "places"])  # one machine code for all sizes
def list_work_kernel(
    tiles,
    items,
    row_items,
    count,
    num_tiles,
    num_rows,
    places,
    window,
    WINDOWED: tl.constexpr,
    SPLIT: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """From tiles to items: each split of a tile is one, while there are places for all; else those of the
    shorter tiles are joined, up to the least number of splits with which they fit.

    tiles int32 `[num_tiles, 4]`; items int32 `[places, RECORD]`: the tile's record, then a half-open range of
    splits; row_items int32 `[num_rows, 4]` as `combine_kernel` reads it; count int32 `[1]`, of items. Program
    i writes the items of tile i, and `ROWS` of the rows; `TILES` is a power of two from `num_tiles` on.
    """
    mine = tl.program_id(0)
    tile = tl.arange(0, TILES)
    there = tile < num_tiles
    first_row = tl.load(tiles + tile * 4, mask=there, other=0)
    rows = tl.load(tiles + tile * 4 + 1, mask=there, other=0)
    position = tl.load(tiles + tile * 4 + 2, mask=there, other=0)
    begin = tl.maximum(position - window + 1, 0) // SPLIT if WINDOWED else tl.zeros([TILES], tl.int32)
    splits = tl.where(rows > 0, (position + rows - 1) // SPLIT + 1 - begin, 0)

    together = 1
    needed = tl.sum(splits)
    while needed > places:  # ends, for there are as many places as tiles
        together *= 2
        needed = tl.sum(tl.where(splits > together, splits, tl.minimum(splits, 1)))
    pieces = tl.where(splits > together, splits, tl.minimum(splits, 1))
    ends = tl.cumsum(pieces, 0)
    if mine == 0:
        tl.store(count, tl.sum(pieces))

    is_mine = tile == mine
    my_pieces = tl.sum(tl.where(is_mine, pieces, 0))
    if my_pieces > 0:
        my_first = tl.sum(tl.where(is_mine, ends - pieces, 0))
        my_begin, my_splits = tl.sum(tl.where(is_mine, begin, 0)), tl.sum(tl.where(is_mine, splits, 0))
        each = my_splits // my_pieces
        for start in range(0, my_pieces, AT_ONCE):
            piece = start + tl.arange(0, AT_ONCE)
            record, kept = items + (my_first + piece) * RECORD, piece < my_pieces
            for number in tl.static_range(4):
                tl.store(record + number, tl.load(tiles + mine * 4 + number), mask=kept)
            tl.store(record + 4, my_begin + piece * each, mask=kept)
            tl.store(record + 5, my_begin + piece * each + each, mask=kept)

    row = mine * ROWS + tl.arange(0, ROWS)
    first, after = first_row[None, :], (first_row + rows)[None, :]
    holds = (row[:, None] >= first) & (row[:, None] < after)
    of_row, kept = row_items + row * 4, row < num_rows
    tl.store(of_row, tl.sum(tl.where(holds, (ends - pieces)[None, :], 0), axis=1), mask=kept)
    tl.store(of_row + 1, tl.sum(tl.where(holds, pieces[None, :], 0), axis=1), mask=kept)
    tl.store(of_row + 2, tl.sum(tl.where(holds, row[:, None] - first, 0), axis=1), mask=kept)


@triton.jit
def generated_kernel(
    qkv,
    pool,
    tables,
    items,
    count,
    partial,
    weights,
    row_elements,
    slab_elements,
    keys,
    values,
    key_scales,
    value_scales,
    window,
    scale,
    soft_cap,
    MIXED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    MOST_LINES: tl.constexpr,
    LINE_TILES: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    LEVELS: tl.constexpr,
    SPLIT_STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    """Splits of generated rows: as many programs as run at once take the items that `list_work_kernel` wrote.

    partial float32 `[places, kv_heads, MOST_LINES, HEAD_DIM]` and weights float32 `[places, kv_heads,
    MOST_LINES, 2]`, largest score and sum of weights: of the splits of an item, joined. What lies next in the
    list lies next in memory: the heads of one split.
    """
    units = tl.load(count) * (LINE_TILES * NUM_KV_HEADS)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        head = unit % NUM_KV_HEADS
        first_line = (unit // NUM_KV_HEADS) % LINE_TILES * LINES
        place = unit // (NUM_KV_HEADS * LINE_TILES)
        record = items + place * RECORD
        first_row, rows = tl.load(record), tl.load(record + 1)
        first_position, table = tl.load(record + 2), tables + tl.load(record + 3)
        begin_split, end_split = tl.load(record + 4), tl.load(record + 5)

        line = first_line + tl.arange(0, LINES)
        row = line // GROUP
        exists = row < rows
        query = queries(qkv, row_elements, first_row, row, head, line, exists, GROUP, HEAD_DIM, WIDTH)
        last_row = tl.minimum(rows - 1, (first_line + LINES - 1) // GROUP)
        end = first_position + last_row + 1
        lowest = first_position + first_line // GROUP - window + 1 if WINDOWED else 0
        lowest = tl.maximum(lowest, 0)
        begin_step = tl.maximum(begin_split * SPLIT_STEPS, lowest // KEYS)
        end_step = tl.minimum(end_split * SPLIT_STEPS, tl.cdiv(end, KEYS))
        whole_begin, whole_end = begin_step, begin_step
        if MIXED:
            first_place = first_position + first_line // GROUP
            if WINDOWED:
                whole_begin = tl.maximum(begin_step, tl.cdiv(tl.maximum(end - window, 0), KEYS))
                whole_begin = tl.minimum(whole_begin, end_step)
            whole_end = tl.minimum(tl.maximum((first_place + 1) // KEYS, whole_begin), end_step)
            whole_end = tl.maximum(whole_end, whole_begin)
        state = nothing(LINES, WIDTH) + nothing(LINES, WIDTH)
        for part in tl.static_range(0 if MIXED and WINDOWED else 1 if MIXED else 2, 3):
            state = attend(
                query,
                tl.where(exists, first_position + row, -1),
                lowest,
                end,
                begin_step if part == 0 else whole_begin if part == 1 else whole_end,
                whole_begin if part == 0 else whole_end if part == 1 else end_step,
                table,
                pool,
                keys + head * HEAD_DIM,
                values + head * HEAD_DIM,
                key_scales + head,
                value_scales + head,
                slab_elements,
                window,
                scale,
                soft_cap,
                state,
                part != 1,
                MIXED,
                WINDOWED,
                CAPPED,
                NUM_KV_HEADS * HEAD_DIM,
                HEAD_DIM,
                BLOCK_SHIFT,
                LINES,
                KEYS,
                LEVELS,
                SPLIT_STEPS,
                WIDTH,
                STAGES,
                MANTISSA,
            )
        most, total, sums = join(*state)

        column = tl.arange(0, WIDTH)
        at = (place * NUM_KV_HEADS + head).to(tl.int64) * MOST_LINES + line
        kept = exists[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(partial + at[:, None] * HEAD_DIM + column[None, :], sums, mask=kept)
        tl.store(weights + at * 2, most, mask=exists)
        tl.store(weights + at * 2 + 1, total, mask=exists)


@triton.jit
def combine_kernel(
    partial,
    weights,
    row_items,
    out,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MOST_LINES: tl.constexpr,
    AHEAD: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out `[rows, heads * HEAD_DIM]`: a row's items joined from the first to the last; zeros without any.

    row_items int32 `[rows, 4]`: first place, number of places, row of the tile. A program takes a row's heads
    of one kv head, `LINES` the power of two from `GROUP` on; what `AHEAD` items need is asked for at once.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    record = row_items + row * 4
    first_place, places, row_of_tile = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    lane, column = tl.arange(0, LINES), tl.arange(0, WIDTH)
    kept = (lane < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    most, total, values = nothing(LINES, WIDTH)
    for start in range(0, places, AHEAD):
        for ahead in tl.static_range(AHEAD):
            is_place = start + ahead < places
            place = (first_place + start + ahead).to(tl.int64)
            at = (place * NUM_KV_HEADS + head) * MOST_LINES + row_of_tile * GROUP + lane
            mine = is_place & (lane < GROUP)
            most_here = tl.load(weights + at * 2, mask=mine, other=float("-inf"))
            total_here = tl.load(weights + at * 2 + 1, mask=mine, other=0.0)
            sums = tl.load(
                partial + at[:, None] * HEAD_DIM + column[None, :], mask=is_place & kept, other=0.0
            )
            most, total, values = join(most, total, values, most_here, total_here, sums)
    result = attended(tl.where((places > 0) & (lane < GROUP), total, 1.0), values, out.dtype.element_ty)
    start = row * (NUM_KV_HEADS * GROUP * HEAD_DIM) + (head * GROUP + lane) * HEAD_DIM
    tl.store(out + start[:, None] + column[None, :], result, mask=kept)
