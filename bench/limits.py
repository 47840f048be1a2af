"""The physical limits of the machine, measured in the same run as what is compared with them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch


@dataclasses.dataclass(frozen=True)
class Limits:
    """Best of several tries: other load only ever makes these smaller."""

    matmul_flops: float  # bf16 multiply-adds count as two, per second
    read_bytes: float  # per second, over a buffer far larger than the caches


def best_seconds(run: Callable[[], object], tries: int) -> float:
    """The shortest of `tries` runs, after one that warms up."""
    run()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_limits(dtype: torch.dtype = torch.bfloat16, tries: int = 5) -> Limits:
    """The faster of plain and reordered products of 2048 x 2048 x 4864; a sum over 2 GB."""
    rows, inner, outer = 2048, 2048, 4864
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
    plain = best_seconds(lambda: torch.nn.functional.linear(x, weight), tries)
    reordered = best_seconds(
        lambda: torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], ""), tries
    )
    buffer = torch.ones(500_000_000, dtype=torch.float32)
    read = best_seconds(buffer.sum, tries)
    return Limits(
        matmul_flops=2 * rows * inner * outer / min(plain, reordered),
        read_bytes=buffer.numel() * buffer.element_size() / read,
    )
