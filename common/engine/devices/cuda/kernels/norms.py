"""Root-mean-square norms: one program per row, whose sum of squares has one order."""

from __future__ import annotations

import triton
import triton.language as tl

from common.engine.devices.cuda.kernels.arithmetic import narrow


@triton.jit
def rms_norm_kernel(x, residual, weight, out, width, eps, ADDS: tl.constexpr, WIDTH: tl.constexpr):
    """out `[rows, width]` = norm(x) * weight; with `ADDS` of residual, after residual += x, rounded.

    All contiguous and of one type; `WIDTH` is the power of two from `width` on. Zhang and Sennrich, "Root
    Mean Square Layer Normalization", 2019; rounded where `ReferenceBackend.rms_norm` rounds.
    """
    start = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, WIDTH)
    inside = column < width
    value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    if ADDS:
        held = tl.load(residual + start + column, mask=inside, other=0.0).to(tl.float32)
        rounded = narrow(value + held, kind)
        tl.store(residual + start + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=0) / width + eps)
    wide = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + column, narrow(value * scale * wide, kind), mask=inside)
