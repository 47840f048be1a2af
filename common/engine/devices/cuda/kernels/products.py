"""Products of activations and a weight, `x @ weight.T`, whose rows are each summed in one order.

The order belongs to the weight: its columns lie in `SPLITS` ranges, each is summed from its first column to
its last in one accumulator, and the ranges' sums are added in ascending order. How many rows there are, how
large a tile is, and whether one program sums all ranges or one program each, leaves no trace in the bits.

A tile is computed as out.T = weight @ x.T: the weight's rows are the tensor cores' long side and the
activations' rows the short one, which may be 16. So one row and a thousand go through one kind of
instruction: `wgmma.m64nXk16` on compute capability 9.0, `tcgen05.mma` on 10.0, `mma.m16n8k16` on others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.engine.devices.cuda.kernels.arithmetic import dot, narrow


@triton.jit(do_not_specialize=["rows"])  # one machine code, whatever the number of rows
def product_kernel(
    x,
    weight,
    bias,
    out,
    partials,
    arrived,
    rows,
    width,
    depth,
    x_stride,
    weight_stride,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    PARALLEL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out `[rows, width]` = x `[rows, depth]` @ weight.T, plus bias; summed in float32 and rounded once.

    weight `[width, depth]`, bias `[width]`; where `GATED`, weight `[2 * width, depth]` and bias `[2 * width]`
    are gate rows over up rows, and out = silu(gate) * up, both rounded before. Columns lie side by side,
    strides are those of rows. `WHOLE`: depth is a multiple of `BLOCK_K`.

    `PARALLEL`: a program for each tile and range. partials float32 `[tiles, SPLITS, BLOCK_N, BLOCK_M]`;
    arrived int32 `[tiles]`, zero before and after: the last program of a tile to arrive adds what all have
    left, in ascending order. Nobody waits for anybody. Otherwise any number of programs take tiles in turn.
    """
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles = tiles_m * tl.cdiv(width, OUTPUTS)
    steps = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLITS)  # of a range
    program = tl.program_id(0)
    if PARALLEL:
        tile, split = program // SPLITS, program % SPLITS
        first_row, first_output = _place(tile, tiles, tiles_m, BLOCK_M, OUTPUTS, GROUP)
        x_rows, weight_rows = _rows_of(
            x, weight, first_row, first_output, rows, width, x_stride, weight_stride, GATED, BLOCK_N, BLOCK_M
        )
        total = _range(x_rows, weight_rows, split * steps, steps, depth, WHOLE, BLOCK_N, BLOCK_M, BLOCK_K)
        inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        places = partials + tile.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M) + inside
        tl.store(places + split * (BLOCK_N * BLOCK_M), total)
        tl.debug_barrier()  # all threads have stored when one of them says so
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for other in range(SPLITS):
                total += tl.load(places + other * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            tl.store(arrived + tile, 0)
            _finish(total, bias, out, first_row, first_output, rows, width, GATED, BIASED, BLOCK_N, BLOCK_M)
    else:
        for tile in range(program, tiles, tl.num_programs(0)):
            first_row, first_output = _place(tile, tiles, tiles_m, BLOCK_M, OUTPUTS, GROUP)
            x_rows, weight_rows = _rows_of(
                x,
                weight,
                first_row,
                first_output,
                rows,
                width,
                x_stride,
                weight_stride,
                GATED,
                BLOCK_N,
                BLOCK_M,
            )
            if SPLITS == 1:
                total = _range(x_rows, weight_rows, 0, steps, depth, WHOLE, BLOCK_N, BLOCK_M, BLOCK_K)
            else:
                total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                for split in range(SPLITS):
                    first = split * steps
                    total += _range(
                        x_rows, weight_rows, first, steps, depth, WHOLE, BLOCK_N, BLOCK_M, BLOCK_K
                    )
            _finish(total, bias, out, first_row, first_output, rows, width, GATED, BIASED, BLOCK_N, BLOCK_M)


@triton.jit
def _place(tile, tiles, tiles_m, BLOCK_M: tl.constexpr, OUTPUTS: tl.constexpr, GROUP: tl.constexpr):
    """The first row and first output of a tile. `GROUP` tiles of rows share what they read of the weight
    before the next ones come, so that a wave of programs reads about as much of either from the L2 cache."""
    in_group = GROUP * (tiles // tiles_m)
    first = tile // in_group * GROUP
    high = tl.minimum(tiles_m - first, GROUP)
    tile_in_group = tile % in_group
    return (first + tile_in_group % high) * BLOCK_M, tile_in_group // high * OUTPUTS


@triton.jit
def _rows_of(
    x,
    weight,
    first_row,
    first_output,
    rows,
    width,
    x_stride,
    weight_stride,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Where the tile's rows of x and weight begin, `[BLOCK_M]` and `[BLOCK_N]` pointers. Beyond the last row
    there is the last one again, so that nothing is masked; what it gives is not stored."""
    row = tl.minimum(first_row + tl.arange(0, BLOCK_M), rows - 1)
    output = first_output + _output(GATED, BLOCK_N)
    output = tl.minimum(output, width - 1)
    if GATED:
        output += _is_up(BLOCK_N) * width
    return x + row.to(tl.int64) * x_stride, weight + output.to(tl.int64) * weight_stride


@triton.jit
def _output(GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile's rows, the outputs. Gate and up rows take turns, eight at a time: the tensor cores leave
    rows r and r + 8 in one thread, so that both values of an output meet without a way through memory."""
    place = tl.arange(0, BLOCK_N)
    if GATED:
        return place // 16 * 8 + place % 8
    return place


@triton.jit
def _is_up(BLOCK_N: tl.constexpr):
    return tl.arange(0, BLOCK_N) // 8 % 2


@triton.jit
def _range(
    x_rows,
    weight_rows,
    first_step,
    steps,
    depth,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum over columns `[first_step, first_step + steps) * BLOCK_K`, float32 `[BLOCK_N, BLOCK_M]`."""
    column = tl.arange(0, BLOCK_K)
    last_step = tl.minimum(first_step + steps, tl.cdiv(depth, BLOCK_K))
    left = weight_rows[:, None] + (first_step * BLOCK_K + column)[None, :]
    right = x_rows[None, :] + (first_step * BLOCK_K + column)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(first_step, last_step):
        if WHOLE:
            a = tl.load(left)
            b = tl.load(right)
        else:
            inside = column < depth - step * BLOCK_K
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None], other=0.0)
        total = dot(a, b, total)
        left += BLOCK_K
        right += BLOCK_K
    return total


@triton.jit
def _finish(
    total,
    bias,
    out,
    first_row,
    first_output,
    rows,
    width,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Store what a tile's sums `[BLOCK_N, BLOCK_M]` give."""
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    kind = out.dtype.element_ty
    if BIASED:
        of_bias = tl.minimum(first_output + _output(GATED, BLOCK_N), width - 1)
        if GATED:
            of_bias += _is_up(BLOCK_N) * width
        total += tl.load(bias + of_bias).to(tl.float32)[:, None]
    value = narrow(total, kind)
    if GATED:
        pairs = tl.reshape(value, (BLOCK_N // 16, 2, 8, BLOCK_M))
        gate, up = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
        value = tl.reshape(narrow(silu_mul(gate, up), kind), (OUTPUTS, BLOCK_M))
    row = first_row + tl.arange(0, BLOCK_M)
    output = first_output + tl.arange(0, OUTPUTS)
    places = out + row.to(tl.int64)[None, :] * width + output[:, None]
    inside = (row < rows)[None, :] & (output < width)[:, None]
    tl.store(places, value, mask=inside)


@triton.jit
def silu_mul(gate, up):
    """silu(gate) * up in float32, of values of the activations' type."""
    wide = gate.to(tl.float32)
    return wide / (1.0 + tl.exp(-wide)) * up.to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def silu_mul_kernel(both, out, count, width, BLOCK: tl.constexpr):
    """out `[rows, width]` = silu(gate) * up of both `[rows, 2 * width]`; count is all of out."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = both + place // width * (2 * width) + place % width
    value = silu_mul(tl.load(gate, mask=inside), tl.load(gate + width, mask=inside))
    tl.store(out + place, narrow(value, out.dtype.element_ty), mask=inside)
