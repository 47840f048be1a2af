"""Which GPU a node computes on: the one that its settings name, or any that is free, by a lease.

Owns what `--device`, `--share-gpu` and `--gpu-nodes` mean together. Keeping the lease is gpu_lease.py's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from common.engine.devices.cuda.gpus import TorchGpus
from common.errors import ConfigError, ResourceError
from common.gpu import Gpu, Gpus
from common.node.gpu_lease import TIMES, GpuLease, LeaseTimes
from common.settings.config import EngineSettings, NodeSettings
from common.store.gpu_leases import Terms

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def take_gpu(
    settings: NodeSettings, holder: str, *, gpus: Gpus | None = None, times: LeaseTimes = TIMES
) -> tuple[EngineSettings, GpuLease | None]:
    """The engine's settings with the very GPU that it is to use, and the lease on it; None where it
    computes on no GPU. May take `times.ttl_s` and longer. `ConfigError` for a GPU that is not there,
    `ResourceError` if others have all of them."""
    engine = settings.engine
    if engine.device == "cpu":
        return engine, None
    visible = (gpus or TorchGpus()).visible()
    if not visible and engine.device == "auto":
        return engine, None
    candidates = _candidates(engine.device, list(visible))
    nodes_of_each = -(-settings.gpu_nodes // len(candidates))
    engine = dataclasses.replace(
        engine,
        share_gpu=engine.share_gpu or nodes_of_each > 1,
        gpu_memory_utilization=engine.gpu_memory_utilization / nodes_of_each,
    )
    terms = Terms(max(1, int(1000 * engine.gpu_memory_utilization)), engine.share_gpu)
    lease = GpuLease.claim(settings.redis, host_identity(), holder, candidates, terms, times)
    return dataclasses.replace(engine, device=f"cuda:{lease.gpu.index}"), lease


def _candidates(device: str, visible: list[Gpu]) -> list[Gpu]:
    index = device.partition(":")[2]
    if index and int(index) < len(visible):
        return [visible[int(index)]]
    if visible and not index:
        return visible
    count = len(visible)
    found = f"{count} GPU{'' if count == 1 else 's'}, cuda:0 to cuda:{count - 1}" if count else "no GPU"
    raise ConfigError(f"device {device} is set, but torch finds {found}", param="device")


def host_identity() -> str:
    """What all processes of this machine know it by, those in containers too, and no other machine: a
    container has a host name and a machine-id of its own, and the kernel of its host. It is another one
    after a reboot, which no lease outlives."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise ResourceError(f"this machine has no identity in {BOOT_ID}: {error}", param="device") from error
