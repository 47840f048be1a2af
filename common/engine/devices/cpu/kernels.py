"""Fused row kernels of the CPU backend: norms, rotation and KV store, gated activation.

Owns the arithmetic of what lies between two matrix products on the CPU, but for attention (attention.py).
Each kernel computes a row from that row's own inputs in one fixed order, so that its bits do not depend on
the batch.

Arguments are addresses and sizes (a tensor's `data_ptr()` costs 0.1 us where a numpy view costs
2); `like` is a numpy scalar that carries the element type: uint16 stands for bfloat16.
Arithmetic is float32 throughout, rounded once at each store.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, prange

from common.engine.devices.cpu.numba_runtime import fast_exp, kernel, narrow, pointer, size_of, widen
from common.engine.devices.cpu.scaled_rows import SCALE_BYTES, store_scaled, stored_size


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
    key_scales: Any,
    value_scales: Any,
    form: Any,
    like: Any,
) -> Any:
    """Rotate queries in place in qkv[rows, (heads + 2 * kv_heads) * head_dim]; store keys (rotated)
    and values at `slots` (block * block_size + offset; negative: nowhere) of a block-major pool.

    `q_norm` and `k_norm` are addresses of per-head norm weights, 0 for none. `slab`, `key_offset`,
    `value_offset` and, if `form` is not PLAIN, `key_scales` and `value_scales` count bytes.
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
            cell = pool + block * slab + offset * size * stored_size(like, form)
            if len(form) > 0:
                scale_at = pool + block * slab + offset * kv_heads * SCALE_BYTES
                for head in range(kv_heads):
                    k_at = qkv + (row * width + (heads + head) * head_dim) * size_of(like)
                    v_at = k_at + size * size_of(like)
                    out, scale_of = cell + head * head_dim, scale_at + head * SCALE_BYTES
                    store_scaled(k_at, head_dim, out + key_offset, scale_of + key_scales, form, like)
                    store_scaled(v_at, head_dim, out + value_offset, scale_of + value_scales, form, like)
                continue
            k = carray(pointer(cell + key_offset, like), (size,))
            v = carray(pointer(cell + value_offset, like), (size,))
            for i in range(size):
                k[i] = x[row, heads * head_dim + i]
            for i in range(size):
                v[i] = x[row, (heads + kv_heads) * head_dim + i]
