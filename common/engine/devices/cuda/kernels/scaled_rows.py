"""`devices/scaled_rows.py` in kernels: rows of keys and values into 8 bits, and back.

Owns the arithmetic of the formats by their bits, since no card before sm_89 converts them and the interpreter
keeps them as integers. `MANTISSA`, the bits of a format's mantissa, says which it is: 3 is E4M3, 2 is E5M2,
and `PLAIN` stands for rows that are stored as they are computed. All is exact but for the one rounding that
the definition names.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.engine.devices.cuda.kernels.arithmetic import narrow
from common.engine.devices.scaled_rows import LEAST_EXPONENT

PLAIN = tl.constexpr(0)

_LEAST_EXPONENT = tl.constexpr(LEAST_EXPONENT)
_NO_SIGN = tl.constexpr(0x7FFFFFFF)  # of a float32, as those that follow
_INFINITY = tl.constexpr(0x7F800000)
_FRACTION = tl.constexpr(0x007FFFFF)
_THREE_QUARTERS = tl.constexpr(0x00600000)
_TO_INTEGER = tl.constexpr(2.0**23)  # added to a smaller number, it rounds that to an integer, ties to even


@triton.jit
def magnitude(x):
    """float32 as int32 in the order of sizes; what is not finite comes last."""
    return x.to(tl.int32, bitcast=True) & _NO_SIGN


@triton.jit
def exponent_of(largest, MANTISSA: tl.constexpr):
    """Of a row's scale, from the largest `magnitude` of the row; of no meaning where that is not finite."""
    top: tl.constexpr = 8 if MANTISSA == 3 else 15
    exponent = (largest >> 23) - (127 + top) + tl.where((largest & _FRACTION) > _THREE_QUARTERS, 1, 0)
    return tl.minimum(tl.maximum(exponent, _LEAST_EXPONENT), 127 - top)


@triton.jit
def scale_bits(exponent, largest):
    """The scale as the bits of a bfloat16, int16; NaN for a row that is not finite."""
    return tl.where(largest < _INFINITY, (exponent + 127) << 7, 0x7FC0).to(tl.int16)


@triton.jit
def to_8_bits(x, exponent, largest, MANTISSA: tl.constexpr):
    """Elements x float32 of rows, uint8: rounded to nearest, ties to even, and cut off at the largest number.
    exponent and `largest` are of their rows."""
    bias: tl.constexpr = 7 if MANTISSA == 3 else 15
    top: tl.constexpr = 8 if MANTISSA == 3 else 15
    shift: tl.constexpr = 23 - MANTISSA
    bits = (x * _power(-exponent)).to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(bits & _NO_SIGN, ((127 + top) << 23) + 0x00600000)  # 1.75 * 2**top
    steps = size.to(tl.float32, bitcast=True) * (2.0 ** (bias - 1 + MANTISSA)) + _TO_INTEGER
    small = steps.to(tl.int32, bitcast=True) & 0xFF
    large = ((size + ((1 << (shift - 1)) - 1) + ((size >> shift) & 1)) >> shift) - ((127 - bias) << MANTISSA)
    code = tl.where(size < ((128 - bias) << 23), small, large) | sign
    return tl.where(largest < _INFINITY, code, 0x7F).to(tl.uint8)


@triton.jit
def of_8_bits(code, scale, kind: tl.constexpr, MANTISSA: tl.constexpr):
    """code uint8 `[rows, columns]` in `kind`, whose rows have scale, int16 `[rows]`: `scale_bits`.

    A code is a float16 of another bias. E4M3 has no infinity, and its NaN, which only rows have whose scale
    is NaN, is read as a number.
    """
    code = code.to(tl.int32)
    half = ((code & 0x7F) << (10 - MANTISSA)) | ((code & 0x80) << 8)
    wide = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    factor = (scale.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if MANTISSA == 3:
        factor = factor * 256.0
    return narrow(wide * factor[:, None], kind)


@triton.jit
def _power(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
