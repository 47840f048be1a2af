"""CUDA IPC: the reader maps the source's device memory and copies slabs from device to device.

same_host.py passes the descriptor of the generations, which lie in host memory, and the handle of the
slabs. The copies of a pull are one batch on a stream that this pull alone has; it waits for that stream
before its second look at the generations: a copy that still runs proves nothing. The mapping cannot be
revoked, so closing a link only stops new mappings; the source keeps its memory until this end has said that
it is unmapped (mappings.py).
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Sequence

from common.errors import LinkLost, MalformedMessage
from kv_transfer.copy_batch import CopyBatch
from kv_transfer.cuda import NAME_BYTES, Between, Cuda
from kv_transfer.cuda_library import HANDLE_BYTES
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.generations import MappedGenerations
from kv_transfer.mappings import Mapped
from kv_transfer.ports import Piece
from kv_transfer.transports.base import Places, Target
from kv_transfer.transports.same_host import DescriptorServer, receive

# Bytes of a slab, handle of the allocation, the device's name
_PAYLOAD = struct.Struct(f"<Q{HANDLE_BYTES}s{NAME_BYTES}s")


class CudaIpcSource(DescriptorServer):
    """Hands the generations' descriptor and the slabs' handle to readers that prove a link."""

    name = "cuda_ipc"

    def __init__(self, memory: DevicePoolMemory, folder: str = "") -> None:
        """`ConfigError` where the platform has no IPC handles."""
        cuda = memory.cuda
        payload = _PAYLOAD.pack(memory.slab_bytes, cuda.ipc_handle(memory.address(0)), cuda.name)
        super().__init__(memory.fd, folder, payload, memory.mappings)


class CudaIpcReader:
    """A peer's device pool, mapped; `pull` copies."""

    remark = ""

    def __init__(
        self, mapped: MappedGenerations, base: int, target: Target, cuda: Cuda, between: Between, said: Mapped
    ) -> None:
        self._mapped, self._base, self._target, self._cuda = mapped, base, target, cuda
        self._between, self._said = between, said
        self._idle = threading.Condition()  # notified when a pull has ended
        self._pulls = 0  # that run: close waits for them
        self._closed = False  # for pulls
        self._is_open = True  # the mapping

    @classmethod
    def open(cls, link: str, proof: bytes, target: Target, *, cuda: Cuda, folder: str = "") -> CudaIpcReader:
        """Prove that the other end is on this host and of this user, and map its pool."""
        with contextlib.ExitStack() as made:
            with receive(proof, folder) as received:
                if len(received.payload) != _PAYLOAD.size:
                    raise MalformedMessage("not the memory of a device pool", param="proofs")
                slab_bytes, handle, device = _PAYLOAD.unpack(received.payload)
                if slab_bytes != target.source_slab_bytes:
                    raise MalformedMessage("the peer's slabs have another size", param="slab_bytes")
                mapped = MappedGenerations(received.fd)
                made.callback(mapped.close)
                said = received.keep()
                with contextlib.ExitStack() as unmapped:
                    unmapped.callback(said.close)
                    base = cuda.open_ipc(handle)
                    unmapped.pop_all()
                made.callback(_unmap, cuda, base, said)
            between = Between.ONE_DEVICE if device == cuda.name else Between.DEVICES
            reader = cls(mapped, base, target, cuda, between, said)
            made.pop_all()
        return reader

    def pull(self, pieces: Sequence[Piece]) -> None:
        places = Places(pieces)
        if not places.are_inside(self._mapped.num_blocks):
            raise MalformedMessage("the peer's pool has no such block", param="slots")
        batch = self._batch(places)
        with self._idle:
            if self._closed:
                raise LinkLost("the link was closed")
            self._pulls += 1
        try:
            with contextlib.closing(self._cuda.stream()) as stream:
                places.require_unchanged(self._mapped)
                try:
                    stream.copy(batch, self._between)
                finally:  # no copy outlives its pull, even one that fails
                    stream.synchronize()
                places.require_unchanged(self._mapped)
        finally:
            with self._idle:
                self._pulls -= 1
                self._idle.notify_all()
        for piece in pieces:
            self._target.check(piece)

    def _batch(self, places: Places) -> CopyBatch:
        target = self._target
        source = self._base + places.slots * target.source_slab_bytes
        into = target.memory.address(0) + places.blocks * target.memory.slab_bytes
        return CopyBatch.joined(
            CopyBatch.of_ranges(into[which], source[which], target.ranges_of(fill))
            for fill, which in places.by_fill()
        )

    def close(self) -> None:
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._pulls)
            is_open, self._is_open = self._is_open, False
        if not is_open:
            return
        try:
            _unmap(self._cuda, self._base, self._said)
        except BaseException:
            self._is_open = True  # for another try
            raise
        self._mapped.close()


def _unmap(cuda: Cuda, base: int, said: Mapped) -> None:
    """Where the first fails, nobody hears of the second: the owner keeps the memory."""
    cuda.close_ipc(base)
    said.close()
