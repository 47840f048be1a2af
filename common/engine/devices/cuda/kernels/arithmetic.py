"""Arithmetic that all kernels share: wide in, wide between, rounded once.

Owns what the interpreter does otherwise than a GPU. It keeps bfloat16 as 16-bit integers, so that
`tl.dot`, `tl.sum` and `+` of them compute with the integers (triton #11584), and it cuts float32 off to
bfloat16 where a GPU rounds to nearest even. Hence a kernel widens what it loads (`.to(tl.float32)`),
multiplies by `dot`, and stores what `narrow` gives.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """`total + a @ b`, summed in float32; a `[m, k]` and b `[k, n]` of one type, total float32 `[m, n]`."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def narrow(x, kind: tl.constexpr):
    """float32 as `kind`, to nearest even; NaN stays NaN."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        bits = tl.where(is_nan, bits | 0x00400000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(kind)
