"""What the device gives at best, in the same run: copies, products, and copies from pinned host memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from bench.limits import best_seconds

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceLimits:
    """Per second, the best of several tries."""

    name: str
    copy_bytes: float  # read and written by a copy inside the device
    matmul_flops: float  # of bfloat16
    upload_bytes: float  # from pinned memory of the host; 0 where the device is the host


def measure(device: torch.device, tries: int = 10) -> DeviceLimits:
    """See `DeviceLimits`. Gives back all memory: an engine plans with what is free."""
    found = _measured(device, tries)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _measured(device: torch.device, tries: int) -> DeviceLimits:
    """With buffers that no cache holds, on a GPU; a 16th of that on a host."""
    is_gpu = device.type == "cuda"
    size = 2 * GIB if is_gpu else GIB // 8
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    copy = _best(device, lambda: into.copy_(source), tries)
    upload = 0.0
    if is_gpu:
        pinned = torch.zeros(GIB // 4, dtype=torch.uint8, pin_memory=True)
        seconds = _best(device, lambda: into[: len(pinned)].copy_(pinned, non_blocking=True), tries)
        upload = len(pinned) / seconds
    side = 8192 if is_gpu else 1024
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = _best(device, lambda: left @ right, tries)
    return DeviceLimits(
        name=torch.cuda.get_device_name(device) if is_gpu else "host",
        copy_bytes=2 * size / copy,
        matmul_flops=2 * side**3 / product,
        upload_bytes=upload,
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best(device: torch.device, run: Callable[[], object], tries: int) -> float:
    """Several runs at a time, so that what a launch costs the host does not show."""
    together = 8 if device.type == "cuda" else 1

    def timed() -> None:
        for _ in range(together):
            run()
        synchronize(device)

    return best_seconds(timed, tries) / together
