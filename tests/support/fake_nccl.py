"""NCCL without a device: two ranks of one process meet by the id; each end moves when both are there.

A receive is copied only when the sender's exchange is on its stream, as a kernel of NCCL waits for
its peer's. `left` counts communicators that did not end, `groups` the exchanges. Ranges outside the device's
memory are a fault of the device (fake_cuda.py), when they are asked for and when they are copied.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

from common.errors import LinkLost
from kv_transfer.nccl_library import ID_BYTES
from tests.support.fake_cuda import FakeCuda

Ranges = Sequence[tuple[int, int]]


class FakeNccl:
    """`peer_comes`: False for a peer that is never there."""

    def __init__(self, cuda: FakeCuda, *, peer_comes: bool = True) -> None:
        self.cuda, self.peer_comes = cuda, peer_comes
        self.pairs: dict[bytes, dict[int, FakePair]] = {}
        self.lock = threading.Lock()
        self.left = 0
        self.groups: list[tuple[bool, int]] = []  # whether it sends, and how many ranges

    def unique_id(self) -> bytes:
        return os.urandom(ID_BYTES)

    def communicator(self, device: int, unique_id: bytes, rank: int) -> FakePair:
        assert len(unique_id) == ID_BYTES
        with self.lock:
            self.left += 1
            pair = FakePair(self, unique_id, rank)
            self.pairs.setdefault(unique_id, {})[rank] = pair
            return pair


class FakePair:
    def __init__(self, nccl: FakeNccl, unique_id: bytes, rank: int) -> None:
        self._nccl, self._id, self._rank = nccl, unique_id, rank
        self._aborted = False
        self.sending: list[Ranges] = []

    def _peer(self) -> FakePair | None:
        return self._nccl.pairs[self._id].get(1 - self._rank)

    def is_ready(self) -> bool:
        if self._aborted:
            raise LinkLost("aborted")
        return self._nccl.peer_comes and self._peer() is not None

    def exchange(self, ranges: Ranges, stream: int, *, send: bool) -> None:
        self._nccl.groups.append((send, len(ranges)))
        for address, length in ranges:
            self._nccl.cuda.require(address, length)
        if send:
            with self._nccl.lock:
                self.sending.append(list(ranges))
            work = self._wait_taken
        else:
            work = lambda: self._receive(ranges)  # noqa: E731
        self._nccl.cuda.put(stream, work)

    def _wait_taken(self) -> bool:
        return self._aborted or not self.sending

    def _receive(self, ranges: Ranges) -> bool:
        peer = self._peer()
        assert peer is not None
        with self._nccl.lock:
            if self._aborted:
                return True
            if not peer.sending:
                return False
            sent = peer.sending.pop(0)
        assert [length for _, length in sent] == [length for _, length in ranges]
        for (into, length), (source, _) in zip(ranges, sent, strict=True):
            for address in (into, source):
                self._nccl.cuda.require(address, length)
            ctypes.memmove(into, source, length)
        return True

    def abort(self) -> None:
        with self._nccl.lock:
            if not self._aborted:
                self._aborted = True
                self._nccl.left -= 1
