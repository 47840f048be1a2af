"""CUDA IPC: the reader maps the source's device memory and copies slabs from device to device.

same_host.py passes the descriptor of the generations, which lie in host memory, and the handle of the
slabs. Copies run on a stream of the reader, which waits for the stream before its second look at the
generations: a copy that still runs proves nothing. The mapping cannot be revoked, so closing a link only
stops new mappings.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Sequence

from common.errors import LinkLost, MalformedMessage
from kv_transfer.cuda_runtime import HANDLE_BYTES, Cuda
from kv_transfer.generations import MappedGenerations
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.ports import Piece
from kv_transfer.transports.base import Target, require_unchanged
from kv_transfer.transports.same_host import DescriptorServer, receive

_PAYLOAD = struct.Struct(f"<Q{HANDLE_BYTES}s")  # bytes of a slab, handle of the allocation


class CudaIpcSource(DescriptorServer):
    """Hands the generations' descriptor and the slabs' handle to readers that prove a link."""

    name = "cuda_ipc"

    def __init__(self, memory: PoolMemory, cuda: Cuda, folder: str = "") -> None:
        """`ConfigError` where the platform has no IPC handles."""
        handle = cuda.ipc_handle(memory.address(0))
        super().__init__(memory.fd, folder, _PAYLOAD.pack(memory.slab_bytes, handle))


class CudaIpcReader:
    """A peer's device pool, mapped; `pull` copies."""

    remark = ""

    def __init__(self, mapped: MappedGenerations, base: int, target: Target, cuda: Cuda) -> None:
        self._mapped, self._base, self._target, self._cuda = mapped, base, target, cuda
        self._lock = threading.Lock()  # held while copying: close waits
        self._closed = False
        self._slabs = cuda.tensor(base, (mapped.num_blocks, target.source_slab_bytes))
        self._stream = cuda.stream()

    @classmethod
    def open(cls, link: str, proof: bytes, target: Target, *, cuda: Cuda, folder: str = "") -> CudaIpcReader:
        """Prove that the other end is on this host and of this user, and map its pool."""
        with receive(proof, folder) as (fd, payload):
            if len(payload) != _PAYLOAD.size:
                raise MalformedMessage("not the memory of a device pool", param="proofs")
            slab_bytes, handle = _PAYLOAD.unpack(payload)
            if slab_bytes != target.source_slab_bytes:
                raise MalformedMessage("the peer's slabs have another size", param="slab_bytes")
            mapped = MappedGenerations(fd)
        with contextlib.ExitStack() as made:
            made.callback(mapped.close)
            base = cuda.open_ipc(handle)
            made.callback(cuda.close_ipc, base)
            reader = cls(mapped, base, target, cuda)
            made.pop_all()
        return reader

    def pull(self, pieces: Sequence[Piece]) -> None:
        target = self._target
        for piece in pieces:
            if not 0 <= piece.slot < self._mapped.num_blocks:
                raise MalformedMessage(f"the peer's pool has no block {piece.slot}", param="slots")
        with self._lock:
            if self._closed:
                raise LinkLost("the link was closed")
            for piece in pieces:
                require_unchanged(self._mapped, piece)
            try:
                for piece in pieces:
                    self._enqueue(piece)
            finally:  # no copy outlives its pull, even one that fails
                self._stream.synchronize()
            for piece in pieces:
                require_unchanged(self._mapped, piece)
        for piece in pieces:
            target.check(piece)

    def _enqueue(self, piece: Piece) -> None:
        source, into = self._slabs[piece.slot], self._target.memory.slabs[piece.block]
        for offset, length in self._target.ranges(piece):
            self._stream.copy(into[offset : offset + length], source[offset : offset + length])

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                del self._slabs
                with contextlib.ExitStack() as ending:
                    ending.callback(self._mapped.close)
                    ending.callback(self._cuda.close_ipc, self._base)
