"""Keys and values in 8 bits: what is stored of a row. A definition, which devices compute by their own code.

A row is what one position has in one head. Its scale is the least power of two by which all its elements,
divided, are at most the format's largest number, 1.75 * 2**top; never less than 2**LEAST_EXPONENT, nor more
than 2**(127 - top), where elements are cut off instead. Each element is divided by it and rounded to nearest,
ties to even. Formats: OFP8 (Open Compute Project, 2023; Micikevicius et al., arXiv:2209.05433). Scales that
are powers of two: OCP Microscaling Formats 1.0, where they serve 32 elements.

- A row's scale is a function of that row alone: nothing depends on the batch (the numerics rule).
- A power of two rounds nothing: neither division nor multiplication. What is read back has the significant
  bits of the format, so that it is exact in bfloat16, too, and any product may use it as it is. Two devices
  store the same bytes.
- Any other scale would win less than one bit of range at the lower end, and no precision: a float's is the
  same over its whole range.
- What is not finite spoils its row: the scale is NaN, and so is what is read back. Formats differ in what
  they have for infinity, and libraries in what they make of it.
- A row of zeros has the least scale. No number in here, stored or read, is a subnormal float32: a device
  that takes those for zero gives the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.kv_layout import SCALED_DTYPES

TOP_EXPONENTS = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}  # of the largest number, 1.75 * 2**top
LEAST_EXPONENT = -100
VERSION = 1  # raise it when other bytes are stored of the same row

_MAGNITUDE, _MANTISSA, _THREE_QUARTERS, _INFINITY = (
    0x7FFFFFFF,
    0x007FFFFF,
    0x00600000,
    0x7F800000,
)  # of float32
_BIAS, _MANTISSA_BITS = 127, 23


def numerics(dtype: str) -> str:
    """What a numerics class says of KV in this type: nothing where it is stored as it is computed."""
    return f"/kv-{dtype}-{VERSION}" if dtype in SCALED_DTYPES else ""


def scaled(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of rows `[..., head_dim]` what is stored: elements in `dtype`, `[..., head_dim]`, and scales, bfloat16
    `[...]`."""
    top, rows = TOP_EXPONENTS[dtype], rows.float()
    magnitude = (rows.view(torch.int32) & _MAGNITUDE).amax(
        -1
    )  # as integers: in order, and NaN is the largest
    exponent = (magnitude >> _MANTISSA_BITS) - _BIAS - top + ((magnitude & _MANTISSA) > _THREE_QUARTERS).int()
    exponent = exponent.clamp(LEAST_EXPONENT, _BIAS - top)
    scale = ((exponent + _BIAS) << _MANTISSA_BITS).view(torch.float32)
    scale = torch.where(magnitude < _INFINITY, scale, torch.nan)
    largest = 1.75 * 2.0**top
    elements = (rows / scale.unsqueeze(-1)).clamp(-largest, largest)
    return elements.to(dtype), scale.to(torch.bfloat16)


def unscaled(elements: Tensor, scales: Tensor) -> Tensor:
    """What was stored, in float32 `[..., head_dim]`."""
    return elements.float() * scales.float().unsqueeze(-1)
