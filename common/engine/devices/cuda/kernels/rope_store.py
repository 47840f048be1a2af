"""Norm of heads, rotation and the way into the pool: all that a row's queries, keys and values need before
attention, in one pass. A program takes a few heads of one row; a head's sums have one order."""

from __future__ import annotations

import triton
import triton.language as tl

from common.engine.devices.cuda.kernels.arithmetic import narrow
from common.engine.devices.cuda.kernels.scaled_rows import (
    PLAIN,
    exponent_of,
    magnitude,
    scale_bits,
    to_8_bits,
)


@triton.jit
def rope_store_kernel(
    qkv,
    positions,
    slots,
    pool,
    cosines,
    sines,
    query_norm,
    key_norm,
    row_elements,
    slab_elements,
    keys,
    values,
    key_scales,
    value_scales,
    eps,
    NORMED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    """qkv `[rows, row_elements]`: queries are rotated in place, keys and values go to their slots.

    pool is read as slabs of `slab_elements`, in which `keys` and `values` are where the segments
    `[block_size, kv_heads, head_dim]` begin. With `MANTISSA` (kernels/scaled_rows.py) it is bytes, and scales
    `[block_size, kv_heads]` begin at `key_scales` and `value_scales`, in pairs of bytes. positions, slots
    int64 `[rows]`; cosines, sines float32 `[positions, ROTARY_DIM / 2]`; a slot below 0 is stored nowhere. A
    program takes `HEADS` heads of a row; `HALF` and `REST` are powers of two from half of the dimensions that
    turn, and from those that do not, on.
    A thread holds both halves of a pair, so that nothing is read that another one writes. Rotation: Su et
    al., "RoFormer", 2021, halves paired as Hugging Face pairs them; rounded where the reference rounds.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_query = head < NUM_HEADS
    is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    there = head < NUM_HEADS + 2 * NUM_KV_HEADS
    half: tl.constexpr = ROTARY_DIM // 2

    pair = tl.arange(0, HALF)
    paired = pair < half
    start = qkv + row * row_elements + head * HEAD_DIM
    mine = there[:, None] & paired[None, :]
    low = tl.load(start[:, None] + pair[None, :], mask=mine, other=0.0).to(tl.float32)
    high = tl.load(start[:, None] + half + pair[None, :], mask=mine, other=0.0).to(tl.float32)
    kind = qkv.dtype.element_ty
    if HEAD_DIM > ROTARY_DIM:
        still = ROTARY_DIM + tl.arange(0, REST)
        resting = still < HEAD_DIM
        ours = there[:, None] & resting[None, :]
        rest = tl.load(start[:, None] + still[None, :], mask=ours, other=0.0).to(tl.float32)

    if NORMED:
        squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
        if HEAD_DIM > ROTARY_DIM:
            squares += tl.sum(rest * rest, axis=1)
        scale = (1.0 / tl.sqrt_rn(squares / HEAD_DIM + eps))[:, None]
        low = _normed(low, scale, query_norm, key_norm, pair, paired, is_query, is_value, kind)
        high = _normed(high, scale, query_norm, key_norm, half + pair, paired, is_query, is_value, kind)
        if HEAD_DIM > ROTARY_DIM:
            rest = _normed(rest, scale, query_norm, key_norm, still, resting, is_query, is_value, kind)

    angle = tl.load(positions + row) * half + pair
    cosine = tl.load(cosines + angle, mask=paired, other=0.0)[None, :]
    sine = tl.load(sines + angle, mask=paired, other=0.0)[None, :]
    turned_low = tl.where(is_value[:, None], low, low * cosine - high * sine)
    turned_high = tl.where(is_value[:, None], high, high * cosine + low * sine)

    slot = tl.load(slots + row)
    segment = tl.where(is_value, values, keys)
    of_kv = head - tl.where(is_value, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS)
    inside = (slot & ((1 << BLOCK_SHIFT) - 1)) * (NUM_KV_HEADS * HEAD_DIM) + of_kv * HEAD_DIM
    slab = pool + (slot >> BLOCK_SHIFT) * slab_elements + segment + inside
    kept = ((is_key | is_value) & (slot >= 0))[:, None]
    asked = is_query[:, None]

    turned_low, turned_high = narrow(turned_low, kind), narrow(turned_high, kind)
    tl.store(start[:, None] + pair[None, :], turned_low, mask=asked & paired[None, :])
    tl.store(start[:, None] + half + pair[None, :], turned_high, mask=asked & paired[None, :])
    if HEAD_DIM > ROTARY_DIM:
        rest = narrow(rest, kind)
        tl.store(start[:, None] + still[None, :], rest, mask=asked & resting[None, :])

    if MANTISSA != PLAIN:
        turned_low, turned_high = turned_low.to(tl.float32), turned_high.to(tl.float32)
        largest = tl.maximum(tl.max(magnitude(turned_low), axis=1), tl.max(magnitude(turned_high), axis=1))
        if HEAD_DIM > ROTARY_DIM:
            rest = rest.to(tl.float32)
            largest = tl.maximum(largest, tl.max(magnitude(rest), axis=1))
        exponent = exponent_of(largest, MANTISSA)
        scale_at = (slot >> BLOCK_SHIFT) * (slab_elements // 2) + tl.where(is_value, value_scales, key_scales)
        scale_at += (slot & ((1 << BLOCK_SHIFT) - 1)) * NUM_KV_HEADS + of_kv
        scales = pool.to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(scales + scale_at, scale_bits(exponent, largest), mask=(is_key | is_value) & (slot >= 0))
        exponent, largest = exponent[:, None], largest[:, None]
        turned_low = to_8_bits(turned_low, exponent, largest, MANTISSA)
        turned_high = to_8_bits(turned_high, exponent, largest, MANTISSA)
        if HEAD_DIM > ROTARY_DIM:
            rest = to_8_bits(rest, exponent, largest, MANTISSA)
    tl.store(slab[:, None] + pair[None, :], turned_low, mask=kept & paired[None, :])
    tl.store(slab[:, None] + half + pair[None, :], turned_high, mask=kept & paired[None, :])
    if HEAD_DIM > ROTARY_DIM:
        tl.store(slab[:, None] + still[None, :], rest, mask=kept & resting[None, :])


@triton.jit
def _normed(x, scale, query_norm, key_norm, column, inside, is_query, is_value, kind):
    """x `[heads, columns]` times its head's scale and weight, rounded; values as they are."""
    of_query = tl.load(query_norm + column, mask=inside, other=0.0).to(tl.float32)
    of_key = tl.load(key_norm + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.where(is_query[:, None], of_query[None, :], of_key[None, :])
    normed = narrow(x * scale * weight, kind).to(tl.float32)
    return tl.where(is_value[:, None], x, normed)
