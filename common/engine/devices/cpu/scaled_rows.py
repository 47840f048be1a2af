"""`devices/scaled_rows.py` in numba: rows of keys and values into 8 bits, and back.

Owns the arithmetic of formats by their bits: `FORMATS` has of each how many its mantissa has, the bias of its
exponent, the exponent of its largest number, and the first code that is no finite number. `PLAIN`, the empty
tuple, stands for elements that are stored as they are computed. Everything here is exact but for the one
rounding that the definition names: the result does not depend on the processor.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import carray

from common.engine.devices.cpu.numba_runtime import (
    bits_of_float,
    exact,
    float_of_bits,
    narrow,
    pointer,
    size_of,
    widen,
)
from common.engine.devices.scaled_rows import LEAST_EXPONENT

PLAIN: tuple[int, ...] = ()
FORMATS = {torch.float8_e4m3fn: (3, 7, 8, 0x7F), torch.float8_e5m2: (2, 15, 15, 0x7C)}
SCALE_BYTES = 2

_BIAS, _MANTISSA_BITS, _MANTISSA, _THREE_QUARTERS = 127, 23, 0x007FFFFF, 0x00600000  # of a float32
_INFINITY, _NAN, _NO_SIGN, _SHORT_NAN = 0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7FC0
_TO_INTEGER = np.float32(2.0**23)  # added to a smaller number, it rounds that to an integer, ties to even


@exact
def stored_size(like: Any, form: Any) -> Any:
    """Bytes of one element in the pool."""
    return 1 if len(form) > 0 else size_of(like)


@exact
def _power(exponent: Any) -> Any:
    return float_of_bits(numba.uint32((exponent + _BIAS) << _MANTISSA_BITS))


@exact
def _to_8_bits(value: Any, form: Any) -> Any:
    """Rounded to nearest, ties to even, and cut off at the largest number; `value` is finite."""
    mantissa, bias, top, _ = form
    shift = numba.uint32(_MANTISSA_BITS - mantissa)
    bits = bits_of_float(value)
    sign = (bits >> numba.uint32(24)) & numba.uint32(0x80)
    size = min(float_of_bits(bits & numba.uint32(_NO_SIGN)), np.float32(1.75) * _power(top))
    steps = size * _power(bias - 1 + mantissa) + _TO_INTEGER
    small = bits_of_float(steps) & numba.uint32(0xFF)
    bits = bits_of_float(size)
    half = (numba.uint32(1) << (shift - numba.uint32(1))) - numba.uint32(1)
    rounded = (bits + half + ((bits >> shift) & numba.uint32(1))) >> shift
    large = rounded - numba.uint32((_BIAS - bias) << mantissa)
    return numba.uint8((small if size < _power(1 - bias) else large) | sign)


@exact
def _of_8_bits(stored: Any, form: Any) -> Any:
    """As float32; what is not finite as NaN."""
    mantissa, bias, _, first_other = form
    code = numba.int32(stored) & numba.int32(0x7F)
    small = bits_of_float(np.float32(code) * _power(1 - bias - mantissa))
    large = (numba.uint32(code) << numba.uint32(_MANTISSA_BITS - mantissa)) + (
        numba.uint32((_BIAS - bias) << _MANTISSA_BITS)
    )
    size = small if code < numba.int32(1 << mantissa) else large
    size = numba.uint32(_NAN) if code >= numba.int32(first_other) else size
    return float_of_bits(size | (numba.uint32(stored & numba.uint8(0x80)) << numba.uint32(24)))


@exact
def store_scaled(row: Any, count: Any, out: Any, scale_at: Any, form: Any, like: Any) -> Any:
    """Store the `count` elements at the address `row` at `out`, and their scale."""
    x = carray(pointer(row, like), (count,))
    y = carray(pointer(out, np.uint8(0)), (count,))
    scale = carray(pointer(scale_at, np.uint16(0)), (1,))
    highest = numba.uint32(0)
    for i in range(count):
        highest = max(highest, bits_of_float(widen(x[i])) & numba.uint32(_NO_SIGN))
    top = form[2]
    exponent = numba.int64(highest >> numba.uint32(_MANTISSA_BITS)) - _BIAS - top
    if highest & numba.uint32(_MANTISSA) > numba.uint32(_THREE_QUARTERS):
        exponent += 1
    exponent = min(max(exponent, LEAST_EXPONENT), _BIAS - top)
    is_finite = highest < numba.uint32(_INFINITY)
    scale[0] = numba.uint16((exponent + _BIAS) << 7 if is_finite else _SHORT_NAN)
    inverse = _power(-exponent)
    for i in range(count):
        y[i] = _to_8_bits(widen(x[i]) * inverse, form) if is_finite else numba.uint8(0x7F)


@exact
def load_scaled(row: Any, scale_at: Any, count: Any, out: Any, form: Any, like: Any) -> Any:
    """Put the `count` elements that are stored at `row` at `out`, in `like`'s type, which has room for all
    their bits."""
    x = carray(pointer(row, np.uint8(0)), (count,))
    y = carray(pointer(out, like), (count,))
    scale = widen(carray(pointer(scale_at, np.uint16(0)), (1,))[0])
    for i in range(count):
        y[i] = narrow(_of_8_bits(x[i], form) * scale, like)
