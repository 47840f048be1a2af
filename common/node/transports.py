"""Makes the transports of a node: those that the settings name and this machine and its pool allow.

The settings give the order; a link takes the first that both of its ends prove (handshake.py). A
transport that cannot read the pool is left out: `shm` reads host memory, `cuda_ipc` and `nccl` a
device's. A node does not start if none of the named transports is left.
"""

from __future__ import annotations

import contextlib
import functools

from common.errors import ConfigError, PdqError
from common.kv_layout import KVLayout
from common.logs import get_logger
from common.settings.config import NodeSettings
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.lease import Leases
from kv_transfer.link_ends import Transports
from kv_transfer.nccl_library import NcclLibrary
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.transports.base import Opener, Source
from kv_transfer.transports.cuda_ipc import CudaIpcReader, CudaIpcSource
from kv_transfer.transports.nccl import NcclReader, NcclSource, Turns
from kv_transfer.transports.nixl import NixlReader, NixlSource
from kv_transfer.transports.seam import guarded
from kv_transfer.transports.shm import ShmReader, ShmSource
from kv_transfer.transports.tcp import TcpReader, TcpSource

log = get_logger("node")

Ends = tuple[Source, Opener]


def make_transports(
    settings: NodeSettings, memory: PoolMemory, layout: KVLayout, leases: Leases
) -> Transports:
    """Both ends of each transport, fastest first. `ConfigError` if a named one cannot be made."""
    found: list[tuple[str, Ends]] = []
    with contextlib.ExitStack() as made:
        for name in settings.transports:
            if not _reads(name, memory):
                continue
            try:
                ends = guarded(name, _make, name, settings, memory, layout, leases)
            except PdqError as error:
                if name == "cuda_ipc":  # one of the default ones; some platforms have no handles
                    log.warning("transport.unavailable", name=name, error=error)
                    continue
                raise ConfigError(f"transport {name}: {error}", param="transports") from error
            made.callback(ends[0].close)
            found.append((name, ends))
        made.pop_all()
    if settings.transports and not found:
        place = "host memory" if memory.cuda is None else "a CUDA device"
        raise ConfigError(
            f"none of the transports {', '.join(settings.transports)} reads a pool on {place}; "
            "add tcp (--transports)",
            param="transports",
        )
    log.info("transports", names=",".join(name for name, _ in found))
    return [source for _, (source, _) in found], {name: opener for name, (_, opener) in found}


def _reads(name: str, memory: PoolMemory) -> bool:
    on_device = memory.cuda is not None
    return {"shm": not on_device, "cuda_ipc": on_device, "nccl": on_device}.get(name, True)


def _make(name: str, settings: NodeSettings, memory: PoolMemory, layout: KVLayout, leases: Leases) -> Ends:
    bus, folder = settings.bus, settings.shm_dir
    network = {"host": bus.host, "advertise_host": bus.advertise_host, "secret_key": bus.secret_key}
    if name == "shm":
        return ShmSource(memory, folder), functools.partial(ShmReader.open, folder=folder)
    if name == "nixl":
        return NixlSource(memory), NixlReader.open
    if name == "tcp":
        encrypts = settings.encrypt_blocks
        source = TcpSource(memory, layout, leases, **network, encrypts=encrypts)
        return source, functools.partial(TcpReader.open, secret_key=bus.secret_key, encrypts=encrypts)
    assert isinstance(memory, DevicePoolMemory), "they read a pool on a device"
    cuda = memory.cuda
    if name == "cuda_ipc":
        opener = functools.partial(CudaIpcReader.open, cuda=cuda, folder=folder)
        return CudaIpcSource(memory, folder), opener
    nccl, turns = NcclLibrary(), Turns()
    cuda.give_way()
    return (
        NcclSource(memory, layout, leases, cuda, nccl, turns, **network),
        functools.partial(NcclReader.connect, cuda=cuda, nccl=nccl, turns=turns, secret_key=bus.secret_key),
    )
