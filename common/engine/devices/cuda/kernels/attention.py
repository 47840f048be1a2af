"""Attention out of the paged pool: generated rows and prompts, by one sum in one order.

Owns that order, which is a function of a row's position and window alone. Keys are taken in steps of `KEYS`
positions, steps in splits of `SPLIT`, both aligned to absolute position. Within a split a running softmax
(Milakov and Gimelshein, 2018) goes from the first step to the last; splits are joined the same way, from the
first to the last. Who computes a split, and how many of them, leaves no trace: `generated_kernel` writes them
down for `combine_kernel` to join, or joins several itself, and `prompt_kernel` joins all. To join a split
that a row does not see changes no bit.

A *line* is a query head at a position. The heads that share keys and values lie side by side, positions one
after the other, so that what is read is read once for all: line = row * GROUP + head.

What a row does not see leaves no trace in it: neither scores nor values of such positions, NaN or not, get
into its sums. A row that sees what is not finite is not finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.engine.devices.cuda.kernels.arithmetic import dot, narrow
from common.engine.devices.cuda.kernels.scaled_rows import PLAIN, of_8_bits


@triton.jit
def _sums_of_lines(x, LINES: tl.constexpr, KEYS: tl.constexpr, LEVELS: tl.constexpr):
    """Sums over axis 1 of x `[LINES, KEYS]`, `KEYS` two to the `LEVELS`: halves are added, again and again.
    How a sum of more than two is ordered depends on which thread holds what; that of two does not."""
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [LINES, 2, KEYS >> (level + 1)]), axis=1)
    return tl.reshape(x, [LINES])


@triton.jit
def _finite(x):
    """Minus infinity, of a line that has seen nothing yet, as zero: infinities have no difference."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def join(most, total, values, most_here, total_here, values_here):
    """The softmax of two sets of keys from those of both: largest score, sum of weights, weighted values."""
    larger = tl.maximum(most, most_here)
    against = _finite(larger)
    before, here = tl.exp2(most - against), tl.exp2(most_here - against)
    values = values * before[:, None] + values_here * here[:, None]
    return larger, total * before + total_here * here, values


@triton.jit
def attend(
    query,
    place,
    lowest,
    end,
    begin_step,
    end_step,
    table,
    pool,
    keys,
    values,
    key_scales,
    value_scales,
    slab_elements,
    window,
    scale,
    soft_cap,
    state,
    MASKED: tl.constexpr,
    MIXED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    POSITION_ELEMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    LEVELS: tl.constexpr,
    SPLIT_STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    """The softmax of `[begin_step, end_step)` joined to `state`: all splits before, and this one as far as it
    has come, each a largest score and a sum of weights `[LINES]` and weighted values `[LINES, WIDTH]`.

    query `[LINES, WIDTH]`; place int32 `[LINES]`, a line's position. `MASKED`: some line does not see all
    positions of the steps; none sees one outside `[lowest, end)`. `MIXED`: lines differ in what they see, so
    that values that are not finite are looked for first, and reach a line by its score.
    """
    all_most, all_total, all_values, most, total, sums = state
    column = tl.arange(0, WIDTH)
    kind: tl.constexpr = query.dtype
    block = _blocks(table, begin_step * KEYS + tl.arange(0, KEYS), lowest, end, BLOCK_SHIFT)
    for step in tl.range(begin_step, end_step, num_stages=1 if MASKED and MIXED else STAGES):
        if step % SPLIT_STEPS == 0:
            all_most, all_total, all_values = join(all_most, all_total, all_values, most, total, sums)
            most = tl.full([LINES], float("-inf"), tl.float32)
            total = tl.zeros([LINES], tl.float32)
            sums = tl.zeros([LINES, WIDTH], tl.float32)
        position = step * KEYS + tl.arange(0, KEYS)
        inside = (position >= lowest) & (position < end)
        offset = block.to(tl.int64) * slab_elements
        offset += (position & ((1 << BLOCK_SHIFT) - 1)) * POSITION_ELEMENTS
        scale_at = block.to(tl.int64) * (slab_elements // 2)
        scale_at += (position & ((1 << BLOCK_SHIFT) - 1)) * (POSITION_ELEMENTS // HEAD_DIM)
        block = _blocks(table, position + KEYS, lowest, end, BLOCK_SHIFT)  # of the next step, meanwhile
        sound = inside
        if MASKED and MIXED:
            value = _rows(
                pool,
                values,
                value_scales,
                offset,
                scale_at,
                column,
                inside,
                kind,
                MASKED,
                HEAD_DIM,
                WIDTH,
                MANTISSA,
            )
            value = value.to(tl.float32)
            sound = sound & (tl.max(tl.where(tl.abs(value) < float("inf"), 0, 1), axis=1) == 0)
        key = _rows(
            pool, keys, key_scales, offset, scale_at, column, inside, kind, MASKED, HEAD_DIM, WIDTH, MANTISSA
        )
        score = dot(query, tl.trans(key), tl.zeros([LINES, KEYS], tl.float32))
        score = score * scale
        if CAPPED:  # cap * tanh(x / cap), which is cap - 2 * cap / (1 + exp(2 * x / cap))
            score = soft_cap - 2.0 * soft_cap / (1.0 + tl.exp2(score))
        if MASKED:
            seen = position[None, :] <= place[:, None]
            if WINDOWED:
                seen = seen & (position[None, :] > place[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
            if MIXED:
                score = tl.where(seen & ~sound[None, :], float("nan"), score)

        larger = tl.maximum(most, tl.max(score, axis=1))
        against = _finite(larger)
        weight = tl.exp2(score - against[:, None])
        before = tl.exp2(most - against)
        total = total * before + _sums_of_lines(weight, LINES, KEYS, LEVELS)
        most = larger

        value = _rows(
            pool,
            values,
            value_scales,
            offset,
            scale_at,
            column,
            sound,
            kind,
            MASKED,
            HEAD_DIM,
            WIDTH,
            MANTISSA,
        )
        sums = dot(narrow(weight, kind), value, sums * before[:, None])
    return all_most, all_total, all_values, most, total, sums


@triton.jit
def _blocks(table, position, lowest, end, BLOCK_SHIFT: tl.constexpr):
    """Which blocks hold these positions; of those that no line sees, block 0."""
    inside = (position >= lowest) & (position < end)
    return tl.load(table + (position >> BLOCK_SHIFT), mask=inside, other=0)


@triton.jit
def _rows(
    pool,
    segment,
    scales,
    offset,
    scale_at,
    column,
    inside,
    kind: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    """A head's keys or values of some positions as they are multiplied, `[positions, WIDTH]`."""
    stored = _load(pool + segment, offset, column, inside, MASKED, HEAD_DIM, WIDTH)
    if MANTISSA == PLAIN:
        return stored
    at = pool.to(tl.pointer_type(tl.int16), bitcast=True) + scales + scale_at
    if MASKED:
        scale = tl.load(at, mask=inside, other=0)
    else:
        scale = tl.load(at)
    return of_8_bits(stored, scale, kind, MANTISSA)


@triton.jit
def _load(segment, offset, column, inside, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """What is stored of them, `[positions, WIDTH]`; zeros beyond `HEAD_DIM`."""
    at = segment + offset[:, None] + column[None, :]
    if MASKED:
        return tl.load(at, mask=inside[:, None] & (column < HEAD_DIM)[None, :], other=0)
    if HEAD_DIM < WIDTH:
        return tl.load(at, mask=(column < HEAD_DIM)[None, :], other=0)
    return tl.load(at)


@triton.jit
def nothing(LINES: tl.constexpr, WIDTH: tl.constexpr):
    """The softmax of no keys."""
    most = tl.full([LINES], float("-inf"), tl.float32)
    return most, tl.zeros([LINES], tl.float32), tl.zeros([LINES, WIDTH], tl.float32)


@triton.jit
def attended(total, values, kind):
    """What a line gives. No zero is negative: whether one were depends on steps that it does not see."""
    return narrow(values / total[:, None] + 0.0, kind)


@triton.jit
def queries(
    qkv,
    row_elements,
    first_row,
    row,
    head,
    line,
    exists,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The queries of a kv head's lines, `[LINES, WIDTH]`; zeros for those that do not exist."""
    column = tl.arange(0, WIDTH)
    start = (first_row + row).to(tl.int64) * row_elements + (head * GROUP + line % GROUP) * HEAD_DIM
    kept = exists[:, None] & (column < HEAD_DIM)[None, :]
    return tl.load(qkv + start[:, None] + column[None, :], mask=kept, other=0.0)


@triton.jit
def prompt_kernel(
    qkv,
    pool,
    tables,
    tiles,
    out,
    row_elements,
    slab_elements,
    keys,
    values,
    key_scales,
    value_scales,
    window,
    scale,
    soft_cap,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    LINE_TILES: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    LEVELS: tl.constexpr,
    SPLIT_STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    """All splits of `LINES` lines of a tile and a kv head, joined.

    tiles int32 `[tiles, 4]`: first row, rows, first position, where in tables; out `[rows, heads *
    HEAD_DIM]`. The last tiles, which mostly see the most, begin first. Steps that all lines see whole need no
    masks.
    """
    unit = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    first_line = unit % LINE_TILES * LINES
    record = tiles + unit // LINE_TILES * 4
    first_row, rows = tl.load(record), tl.load(record + 1)
    if first_line < rows * GROUP:
        first_position, table = tl.load(record + 2), tables + tl.load(record + 3)
        line = first_line + tl.arange(0, LINES)
        row = line // GROUP
        exists = row < rows
        query = queries(qkv, row_elements, first_row, row, head, line, exists, GROUP, HEAD_DIM, WIDTH)
        place = tl.where(exists, first_position + row, -1)
        first_place = first_position + first_line // GROUP
        last_place = first_position + tl.minimum(rows - 1, (first_line + LINES - 1) // GROUP)
        lowest = tl.maximum(first_place - window + 1, 0) if WINDOWED else 0
        end = last_place + 1
        begin_step, end_step = lowest // KEYS, tl.cdiv(end, KEYS)
        whole_begin = begin_step
        if WINDOWED:
            whole_begin = tl.minimum(tl.cdiv(tl.maximum(last_place - window + 1, 0), KEYS), end_step)
        whole_end = tl.maximum((first_place + 1) // KEYS, whole_begin)

        state = nothing(LINES, WIDTH) + nothing(LINES, WIDTH)
        for part in tl.static_range(0 if WINDOWED else 1, 3):
            state = attend(
                query,
                place,
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
                True,
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
        _, total, sums = join(*state)
        result = attended(tl.where(exists, total, 1.0), sums, out.dtype.element_ty)
        column = tl.arange(0, WIDTH)
        start = (first_row + row).to(tl.int64) * (NUM_KV_HEADS * GROUP * HEAD_DIM)
        start += (head * GROUP + line % GROUP) * HEAD_DIM
        kept = exists[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(out + start[:, None] + column[None, :], result, mask=kept)
