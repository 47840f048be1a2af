"""Norms of a step's rows, launched."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor

from common.engine.devices.cuda.kernels.norms import rms_norm_kernel
from common.engine.devices.cuda.launch import Launch, Work, power_of_two


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
    """x, out `[rows, width]`, weight `[width]`, contiguous and of one type."""
    rows, width = x.shape
    _launch(width, adds=False)((rows,), x, x, weight, out, width, eps)


def add_rms_norm(delta: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
    """residual += delta in place; out is the norm of residual. Shapes as in `rms_norm`."""
    rows, width = delta.shape
    _launch(width, adds=True)((rows,), delta, residual, weight, out, width, eps)


@functools.cache
def _launch(width: int, *, adds: bool) -> Launch:
    padded = power_of_two(width)
    return Launch(
        kernel=rms_norm_kernel,
        constants={"ADDS": adds, "WIDTH": padded},
        num_warps=min(8, max(1, padded // 512)),
    )


def works(rows: int, width: int, kind: str, size: int) -> Iterator[Work]:
    """The norms of `rows` rows; `kind` is triton's word for the type, of `size` bytes."""
    types = (f"*{kind}",) * 4 + ("i32", "fp32")
    for adds in (False, True):
        yield Work(
            name=f"{'add_' if adds else ''}rms_norm {rows}x{width}",
            launch=_launch(width, adds=adds),
            types=types,
            multiples=frozenset({"width"} if width % 16 == 0 else ()),
            num_programs=rows,
            num_bytes=size * width * (rows * (4 if adds else 2) + 1),
        )
