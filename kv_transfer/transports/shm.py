"""Shared memory: the reader maps the source's pool read-only and copies slabs straight out of it.

A slab costs one memcpy, without a message or staging. same_host.py passes the pool's descriptor, and
proves that both ends are processes of one user on one host.

A mapping cannot be revoked, so closing a link only stops new mappings. Readers prove after each copy
that no generation changed while they copied (seqlock).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from common.errors import LinkLost, MalformedMessage
from kv_transfer.generations import MappedGenerations
from kv_transfer.pool_memory import PoolMemory, copy_ranges
from kv_transfer.ports import Piece
from kv_transfer.transports.base import Target, require_unchanged
from kv_transfer.transports.same_host import DescriptorServer, receive


class ShmSource(DescriptorServer):
    """Hands the descriptor of `memory` to readers that can prove a link."""

    name = "shm"

    def __init__(self, memory: PoolMemory, folder: str = "") -> None:
        super().__init__(memory.fd, folder)


class ShmReader:
    """A peer's pool, mapped; `pull` copies."""

    remark = ""

    def __init__(self, mapped: MappedGenerations, target: Target) -> None:
        self._mapped, self._target = mapped, target
        self._idle = threading.Condition()  # notified when the last pull has ended
        self._pulls = 0  # that run: close waits for them
        self._closed = False

    @classmethod
    def open(cls, link: str, proof: bytes, target: Target, *, folder: str = "") -> ShmReader:
        """Prove that the other end is on this host and of this user, and map its pool."""
        with receive(proof, folder) as received:
            mapped = MappedGenerations(received.fd)
        if mapped.content_bytes != mapped.num_blocks * target.source_slab_bytes:
            mapped.close()
            raise MalformedMessage("the peer's slabs have another size", param="slab_bytes")
        return cls(mapped, target)

    def pull(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if not 0 <= piece.slot < self._mapped.num_blocks:
                raise MalformedMessage(f"the peer's pool has no block {piece.slot}", param="slots")
        with self._idle:
            if self._closed:
                raise LinkLost("the link was closed")
            self._pulls += 1
        try:
            self._copy(pieces)
        finally:
            with self._idle:
                self._pulls -= 1
                self._idle.notify_all()

    def _copy(self, pieces: Sequence[Piece]) -> None:
        """Copy and prove the pieces. A slab is digested right after its copy, while it is in cache.
        Without digests one copy directly follows the other, because a copy evicts what Python needs
        between two of them."""
        mapped, target = self._mapped, self._target
        for piece in pieces:
            require_unchanged(mapped, piece)
        for piece in pieces:
            source = mapped.content + piece.slot * target.source_slab_bytes
            copy_ranges(target.memory.address(piece.block), source, target.ranges(piece))
            if piece.digest:
                require_unchanged(mapped, piece)  # first: a torn copy is stale, not corrupt
                target.check(piece)
        for piece in pieces:
            if not piece.digest:
                require_unchanged(mapped, piece)

    def close(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: not self._pulls)
            if not self._closed:
                self._closed = True
                self._mapped.close()
