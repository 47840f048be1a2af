"""Fused row kernels of the CPU backend: norms, rotation and KV store, gated activation, attention.

Owns the arithmetic of everything between two matrix products on the CPU. Each kernel computes a
row from that row's own inputs in one fixed order, so that its bits do not depend on the batch.

Arguments are addresses and sizes (a tensor's `data_ptr()` costs 0.1 us where a numpy view costs
2); `like` is a numpy scalar that carries the element type: uint16 stands for bfloat16.
Arithmetic is float32 throughout, rounded once at each store.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import carray, prange

from common.engine.devices.cpu.lanes import LANES, exp_run, lane_of, peak_run, score_run, value_run
from common.engine.devices.cpu.numba_runtime import fast_exp, inline, kernel, narrow, pointer, size_of, widen

NEGATIVE_INFINITY = np.float32(-np.inf)
SPAN = 128  # positions per pass of attend_generated, aligned to absolute position
KEY_BLOCK = 64  # keys per pass of attend_prompt, aligned to absolute position
QUERY_TILE = 32  # positions per unit of work of attend_prompt; no trace in the bits


@kernel
def rms_norm(source: Any, weight: Any, out: Any, rows: Any, width: Any, eps: Any, like: Any) -> Any:
    """out[rows, width] = source / rms(source) * weight."""
    x = carray(pointer(source, like), (rows, width))
    w = carray(pointer(weight, like), (width,))
    y = carray(pointer(out, like), (rows, width))
    for row in prange(rows):
        total = np.float32(0.0)
        for i in range(width):
            value = widen(x[row, i])
            total += value * value
        scale = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))
        for i in range(width):
            y[row, i] = narrow(widen(x[row, i]) * scale * widen(w[i]), like)


@kernel
def add_rms_norm(
    delta: Any, residual: Any, weight: Any, out: Any, rows: Any, width: Any, eps: Any, like: Any
) -> Any:
    """residual += delta (rounded to its type), then out = rms_norm(residual)."""
    d = carray(pointer(delta, like), (rows, width))
    x = carray(pointer(residual, like), (rows, width))
    w = carray(pointer(weight, like), (width,))
    y = carray(pointer(out, like), (rows, width))
    for row in prange(rows):
        total = np.float32(0.0)
        for i in range(width):
            x[row, i] = narrow(widen(x[row, i]) + widen(d[row, i]), like)
        for i in range(width):
            value = widen(x[row, i])
            total += value * value
        scale = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))
        for i in range(width):
            y[row, i] = narrow(widen(x[row, i]) * scale * widen(w[i]), like)


@kernel
def silu_mul(gate_up: Any, out: Any, rows: Any, width: Any, like: Any) -> Any:
    """out[rows, width] = silu(gate) * up, of gate_up[rows, 2 * width]."""
    x = carray(pointer(gate_up, like), (rows, 2 * width))
    y = carray(pointer(out, like), (rows, width))
    for row in prange(rows):
        for i in range(width):
            gate = widen(x[row, i])
            activated = gate / (np.float32(1.0) + fast_exp(-gate))
            y[row, i] = narrow(activated * widen(x[row, width + i]), like)


@kernel
def rotate_and_store(
    qkv: Any,
    positions: Any,
    slots: Any,
    cosines: Any,
    sines: Any,
    q_norm: Any,
    k_norm: Any,
    pool: Any,
    key_offset: Any,
    value_offset: Any,
    slab: Any,
    block_size: Any,
    rows: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    rotary_dim: Any,
    eps: Any,
    like: Any,
) -> Any:
    """Rotate queries in place in qkv[rows, (heads + 2 * kv_heads) * head_dim]; store keys (rotated)
    and values at `slots` (block * block_size + offset; negative: nowhere) of a block-major pool.

    `q_norm` and `k_norm` are addresses of per-head norm weights, 0 for none. `slab`, `key_offset`
    and `value_offset` count elements, not bytes.
    """
    width = (heads + 2 * kv_heads) * head_dim
    half = rotary_dim // 2
    x = carray(pointer(qkv, like), (rows, width))
    position = carray(pointer(positions, np.int64(0)), (rows,))
    slot = carray(pointer(slots, np.int64(0)), (rows,))
    for row in prange(rows):
        p = position[row]
        c = carray(pointer(cosines + p * half * 4, np.float32(0)), (half,))
        s = carray(pointer(sines + p * half * 4, np.float32(0)), (half,))
        for head in range(heads + kv_heads):
            base = head * head_dim
            norm = q_norm if head < heads else k_norm
            if norm != 0:
                w = carray(pointer(norm, like), (head_dim,))
                total = np.float32(0.0)
                for i in range(head_dim):
                    value = widen(x[row, base + i])
                    total += value * value
                scale = np.float32(1.0) / np.sqrt(total / np.float32(head_dim) + np.float32(eps))
                for i in range(head_dim):
                    x[row, base + i] = narrow(widen(x[row, base + i]) * scale * widen(w[i]), like)
            for i in range(half):
                low, high = widen(x[row, base + i]), widen(x[row, base + half + i])
                x[row, base + i] = narrow(low * c[i] - high * s[i], like)
                x[row, base + half + i] = narrow(high * c[i] + low * s[i], like)
        if slot[row] >= 0:
            block, offset = slot[row] // block_size, slot[row] % block_size
            size = kv_heads * head_dim
            cell = block * slab + offset * size
            k = carray(pointer(pool + (cell + key_offset) * size_of(like), like), (size,))
            v = carray(pointer(pool + (cell + value_offset) * size_of(like), like), (size,))
            for i in range(size):
                k[i] = x[row, heads * head_dim + i]
            for i in range(size):
                v[i] = x[row, (heads + kv_heads) * head_dim + i]


@inline
def block_run(
    position: Any, last: Any, table: Any, block_size: Any, slab_bytes: Any, position_bytes: Any
) -> Any:
    """(how many positions from `position` on, before `last`, lie in its block; where in bytes they begin)."""
    block, offset = position // block_size, position % block_size
    start = numba.int64(table[block]) * slab_bytes + offset * position_bytes
    return min(block_size - offset, last - position), start


@kernel
def attend_generated(
    queries: Any,
    row_stride: Any,
    out: Any,
    tables: Any,
    table_stride: Any,
    lengths: Any,
    pool: Any,
    key_offset: Any,
    value_offset: Any,
    slab: Any,
    block_size: Any,
    rows: Any,
    heads: Any,
    kv_heads: Any,
    shares: Any,
    together: Any,
    lanes: Any,
    window: Any,
    scale: Any,
    like: Any,
) -> Any:
    """Attention of single query rows straight out of the paged pool: out[rows, heads * head_dim].

    Row r reads positions [max(0, lengths[r] - window), lengths[r]) of the blocks tables[r], in spans of
    SPAN positions aligned to absolute position, with a running softmax: scratch stays in the cache
    however long a context is. One row, or the part of its key-value heads that is one of `shares`, is
    one unit of work, and its bits are a function of that row alone.

    `together` has an entry for each query head that reads keys and values at once; a group of key-value
    head's is filled up with heads of zeros. `lanes` has head_dim / 4 entries: lengths that are known when
    compiling.
    """
    head_dim, batch = 4 * len(lanes), len(together)
    group = heads // kv_heads
    batches = (group + batch - 1) // batch  # of a key-value head
    own = kv_heads // shares
    length = carray(pointer(lengths, np.int32(0)), (rows,))
    position_bytes = kv_heads * head_dim * size_of(like)
    batch_bytes, span_bytes = batch * head_dim * 4, batch * SPAN * 4
    slab_bytes = slab * size_of(like)
    for unit in prange(rows * shares):
        row, first_head = unit // shares, unit % shares * own
        table = carray(pointer(tables + row * table_stride * 4, np.int32(0)), (table_stride,))
        q_start = queries + (row * row_stride + first_head * group * head_dim) * size_of(like)
        q = carray(pointer(q_start, like), (own * group, 4 * len(lanes)))
        y_start = out + (row * heads + first_head * group) * head_dim * size_of(like)
        y = carray(pointer(y_start, like), (own * group, 4 * len(lanes)))
        lines = own * batches * batch
        query = np.zeros((lines, 4 * len(lanes)), np.float32)
        result = np.zeros((lines, 4 * len(lanes)), np.float32)
        scores = np.empty(lines * SPAN, np.float32)
        peaks, sums = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        highest = np.full(lines, NEGATIVE_INFINITY, np.float32)
        total = np.zeros(lines, np.float32)
        for head in range(own * group):
            line = head // group * batches * batch + head % group
            for i in range(4 * len(lanes)):
                query[line, lane_of(i, lanes, like)] = widen(q[head, i]) * np.float32(scale)
        query_at, result_at, score_at = query.ctypes.data, result.ctypes.data, scores.ctypes.data
        own_pool = pool + first_head * head_dim * size_of(like)
        end = numba.int64(length[row])
        start = max(0, end - window) if window > 0 else 0
        for span in range(start // SPAN, (end + SPAN - 1) // SPAN):
            first, last = max(start, span * SPAN), min(end, (span + 1) * SPAN)
            position = first
            while position < last:
                run, lies_at = block_run(position, last, table, block_size, slab_bytes, position_bytes)
                k_at = own_pool + key_offset * size_of(like) + lies_at
                for index in range(own * batches):
                    score_run(
                        k_at + index // batches * head_dim * size_of(like),
                        position_bytes,
                        run,
                        query_at + index * batch_bytes,
                        score_at + index * span_bytes + (position - first) * batch * 4,
                        together,
                        lanes,
                        like,
                    )
                position += run
            filled = (last - first) * batch
            vectors = (filled + LANES - 1) // LANES
            for index in range(own * batches):
                at = score_at + index * span_bytes
                for j in range(filled, vectors * LANES):
                    scores[index * batch * SPAN + j] = NEGATIVE_INFINITY
                peak_run(at, vectors, peaks.ctypes.data)
                for head in range(batch):
                    line = index * batch + head
                    peak = highest[line]
                    for j in range(head, LANES, batch):
                        peak = max(peak, peaks[j])
                    for j in range(head, LANES, batch):
                        peaks[j] = peak
                    if highest[line] > NEGATIVE_INFINITY:
                        decay = fast_exp(highest[line] - peak)
                        total[line] *= decay
                        for i in range(4 * len(lanes)):
                            result[line, i] *= decay
                    highest[line] = peak
                exp_run(at, vectors, peaks.ctypes.data, sums.ctypes.data)
                for head in range(batch):
                    for j in range(head, LANES, batch):
                        total[index * batch + head] += sums[j]
            position = first
            while position < last:
                run, lies_at = block_run(position, last, table, block_size, slab_bytes, position_bytes)
                v_at = own_pool + value_offset * size_of(like) + lies_at
                for index in range(own * batches):
                    value_run(
                        v_at + index // batches * head_dim * size_of(like),
                        position_bytes,
                        run,
                        score_at + index * span_bytes + (position - first) * batch * 4,
                        result_at + index * batch_bytes,
                        together,
                        lanes,
                        like,
                    )
                position += run
        for head in range(own * group):
            line = head // group * batches * batch + head % group
            inverse = np.float32(1.0) / total[line]
            for i in range(4 * len(lanes)):
                y[head, i] = narrow(result[line, lane_of(i, lanes, like)] * inverse, like)


@inline
def softmax_step(scores: Any, highest: Any, line: Any, visible_start: Any, visible_end: Any) -> Any:
    """Turn one block of scores into weights; returns (decay of what went before, sum of weights).

    Positions outside [visible_start, visible_end) get weight 0. `highest[line]` is raised.
    """
    if visible_start > 0 or visible_end < KEY_BLOCK:
        for j in range(KEY_BLOCK):
            if j < visible_start or j >= visible_end:
                scores[j] = NEGATIVE_INFINITY
    peak = highest[line]
    for j in range(KEY_BLOCK):
        peak = max(peak, scores[j])
    partial = np.float32(0.0)
    for j in range(KEY_BLOCK):
        weight = fast_exp(scores[j] - peak)
        weight = weight if scores[j] > NEGATIVE_INFINITY else np.float32(0.0)
        scores[j] = weight
        partial += weight
    decay = fast_exp(highest[line] - peak) if highest[line] > NEGATIVE_INFINITY else np.float32(0.0)
    highest[line] = peak
    return decay, partial


@kernel
def attend_prompt(
    queries: Any,
    row_stride: Any,
    out: Any,
    tables: Any,
    table_stride: Any,
    tiles: Any,
    pool: Any,
    key_offset: Any,
    value_offset: Any,
    slab: Any,
    block_size: Any,
    num_tiles: Any,
    heads: Any,
    kv_heads: Any,
    lanes: Any,
    window: Any,
    scale: Any,
    like: Any,
) -> Any:
    """Causal attention of runs of consecutive positions out of the paged pool.

    tiles[num_tiles, 4] are (first row, number of rows, first position, row of tables). Keys are
    taken in blocks of KEY_BLOCK aligned to absolute position, with a running softmax (Dao et al.,
    arXiv:2205.14135, algorithm 1). What a row computes depends on its own position only: keys
    beyond it, or outside the window, enter with weight 0, whole blocks of them are skipped; so how
    a prompt was cut into tiles and chunks leaves no trace in the bits.

    Two heads of one position go together, to halve the reads of a key; a group of odd size is
    filled up with a head of zeros, so that a head always takes the same place of a pair.
    """
    group = heads // kv_heads
    pairs = (group + 1) // 2
    tile = carray(pointer(tiles, np.int32(0)), (num_tiles, 4))
    size = kv_heads * 4 * len(lanes)
    for unit in prange(num_tiles * kv_heads):
        # later tiles cost more: hand them out first
        index, kv_head = num_tiles - 1 - unit // kv_heads, unit % kv_heads
        first_row, count = numba.int64(tile[index, 0]), numba.int64(tile[index, 1])
        first, table_row = numba.int64(tile[index, 2]), numba.int64(tile[index, 3])
        table = carray(pointer(tables + table_row * table_stride * 4, np.int32(0)), (table_stride,))
        end = first + count
        head_offset = kv_head * group * 4 * len(lanes)
        query = np.zeros((count * pairs * 2, 4 * len(lanes)), np.float32)
        result = np.zeros((count * pairs * 2, 4 * len(lanes)), np.float32)
        highest = np.full(count * pairs * 2, NEGATIVE_INFINITY, np.float32)
        total = np.zeros(count * pairs * 2, np.float32)
        for r in range(count):
            start = queries + ((first_row + r) * row_stride + head_offset) * size_of(like)
            q = carray(pointer(start, like), (group, 4 * len(lanes)))
            for g in range(group):
                for i in range(4 * len(lanes)):
                    query[r * pairs * 2 + g, i] = widen(q[g, i]) * np.float32(scale)
        keys = np.empty((4 * len(lanes), KEY_BLOCK), np.float32)
        values = np.empty((KEY_BLOCK, 4 * len(lanes)), np.float32)
        scores_a, scores_b = np.empty(KEY_BLOCK, np.float32), np.empty(KEY_BLOCK, np.float32)
        lowest = max(0, first - window + 1) if window > 0 else 0
        for key_block in range(lowest // KEY_BLOCK, (end + KEY_BLOCK - 1) // KEY_BLOCK):
            base = key_block * KEY_BLOCK
            for j in range(KEY_BLOCK):
                position = base + j
                if lowest <= position < end:
                    cell = numba.int64(table[position // block_size]) * slab
                    cell += (position % block_size) * size + kv_head * 4 * len(lanes)
                    k_start = pool + (cell + key_offset) * size_of(like)
                    v_start = pool + (cell + value_offset) * size_of(like)
                    k = carray(pointer(k_start, like), (4 * len(lanes),))
                    v = carray(pointer(v_start, like), (4 * len(lanes),))
                    for i in range(4 * len(lanes)):
                        values[j, i] = widen(v[i])
                    for i in range(4 * len(lanes)):
                        keys[i, j] = widen(k[i])
                else:
                    for i in range(4 * len(lanes)):
                        values[j, i] = np.float32(0.0)
                        keys[i, j] = np.float32(0.0)
            for pair in range(count * pairs):
                here = first + pair // pairs
                visible_end = min(here + 1 - base, KEY_BLOCK)
                visible_start = max(here + 1 - window - base, 0) if window > 0 else 0
                if visible_end <= visible_start:
                    continue
                a, b = 2 * pair, 2 * pair + 1
                for j in range(KEY_BLOCK):
                    scores_a[j] = np.float32(0.0)
                    scores_b[j] = np.float32(0.0)
                for i in range(0, 4 * len(lanes), 4):
                    a0, a1, a2, a3 = query[a, i], query[a, i + 1], query[a, i + 2], query[a, i + 3]
                    b0, b1, b2, b3 = query[b, i], query[b, i + 1], query[b, i + 2], query[b, i + 3]
                    for j in range(KEY_BLOCK):
                        k0, k1, k2, k3 = keys[i, j], keys[i + 1, j], keys[i + 2, j], keys[i + 3, j]
                        scores_a[j] += (a0 * k0 + a1 * k1) + (a2 * k2 + a3 * k3)
                        scores_b[j] += (b0 * k0 + b1 * k1) + (b2 * k2 + b3 * k3)
                decay_a, sum_a = softmax_step(scores_a, highest, a, visible_start, visible_end)
                decay_b, sum_b = softmax_step(scores_b, highest, b, visible_start, visible_end)
                total[a] = total[a] * decay_a + sum_a
                total[b] = total[b] * decay_b + sum_b
                for i in range(4 * len(lanes)):
                    result[a, i] *= decay_a
                    result[b, i] *= decay_b
                for j in range(0, KEY_BLOCK, 4):
                    a0, a1, a2, a3 = scores_a[j], scores_a[j + 1], scores_a[j + 2], scores_a[j + 3]
                    b0, b1, b2, b3 = scores_b[j], scores_b[j + 1], scores_b[j + 2], scores_b[j + 3]
                    for i in range(4 * len(lanes)):
                        v0, v1 = values[j, i], values[j + 1, i]
                        v2, v3 = values[j + 2, i], values[j + 3, i]
                        result[a, i] += (a0 * v0 + a1 * v1) + (a2 * v2 + a3 * v3)
                        result[b, i] += (b0 * v0 + b1 * v1) + (b2 * v2 + b3 * v3)
        for r in range(count):
            start = out + ((first_row + r) * heads * 4 * len(lanes) + head_offset) * size_of(like)
            y = carray(pointer(start, like), (group, 4 * len(lanes)))
            for g in range(group):
                line = r * pairs * 2 + g
                for i in range(4 * len(lanes)):
                    y[g, i] = narrow(result[line, i] / total[line], like)
