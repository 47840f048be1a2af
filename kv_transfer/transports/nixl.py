"""Slabs by NIXL READ (UCX: RDMA where there is any, else shared memory or TCP). The only user of nixl.

The reader's network reads the source's registered pool straight into the reader's pool. No code of the
source takes part, and no byte of a slab is staged. The generations go to a small buffer of the reader,
in one transfer that ends before that of the slabs begins, and in another that begins after it has ended.

Each link has an agent of its own at both ends. Tearing down a link deregisters the memory and ends the
agent, and with it the remote keys. The proof is a nonce in the source's registered memory: a reader
that finds it there reads the right process. Proofs travel in Hello. UCX neither encrypts nor checks who
connects, so a node has this transport only where a setting names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, LinkLost, MalformedMessage, PdqError, StaleBlock
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.ports import Piece
from kv_transfer.transports.base import Target
from kv_transfer.transports.wires import OPEN_TIMEOUT, STALL_TIMEOUT

_MAGIC = b"pdqnixl1"
# magic, nonce, where it lies, blocks, bytes of a slab, where generations and slabs lie, device
_PROOF = struct.Struct("<8s16sQQQQQi")
_NONCE_BYTES = 16
_SUM_BYTES = 16  # of a proof, at its end: NIXL's own reader of its metadata crashes on damage
_BATCH = 64  # pieces in one transfer at most: what the generations' buffer holds
_SPIN = 0.0005  # seconds of asking without a pause: what a small transfer takes

Ranges = list[tuple[int, int]]  # address, length
Bytes = npt.NDArray[np.uint8]


def _agent(*, serves: bool) -> Any:
    """Make an agent with UCX, with a thread that answers if it `serves`. `ConfigError` without nixl,
    `LinkLost` where nixl cannot make an agent."""
    try:
        import nixl
    except ImportError as error:
        raise ConfigError(f"the nixl transport needs `pip install pdq[nixl]`: {error}") from error
    with _as_link_lost():
        config = nixl.nixl_agent_config(
            enable_prog_thread=serves,
            backends=["UCX"],
            sync_mode=nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        return nixl.nixl_agent(secrets.token_hex(8), config)


def _sealed(body: bytes) -> bytes:
    """Append a checksum, which finds damage. Nothing in nixl protects against a peer that lies."""
    return body + hashlib.blake2b(body, digest_size=_SUM_BYTES).digest()


class _Memory:
    """An agent and the memory that it has registered, which end together."""

    def __init__(self, memory: PoolMemory, own: Bytes, *, serves: bool) -> None:
        """Registers the pool, and `own`, a small array of this link. `LinkLost`, and nothing is left,
        where nixl cannot register them."""
        self.agent = _agent(serves=serves)
        self._registered: list[Any] = []
        try:
            with _as_link_lost():
                self._register(memory, own)
        except BaseException:
            self.close()
            raise

    def _register(self, memory: PoolMemory, own: Bytes) -> None:
        self.kind, device = _place(memory)
        host = [
            (own.ctypes.data, own.nbytes, 0, ""),
            (memory.generations.ctypes.data, memory.generations.nbytes, 0, ""),
        ]
        pool = (memory.address(0), memory.num_blocks * memory.slab_bytes, device, "")
        if self.kind == "DRAM":
            self._registered += [self.agent.register_memory([*host, pool], "DRAM")]
        else:
            self._registered += [self.agent.register_memory(host, "DRAM")]
            self._registered += [self.agent.register_memory([pool], "VRAM")]

    def metadata(self) -> bytes:
        """The metadata that a reader's agent needs to connect."""
        with _as_link_lost():
            return bytes(self.agent.get_agent_metadata())

    def close(self) -> None:
        """Deregister the memory and end the agent, which ends whatever could not be deregistered."""
        for registered in self._registered:
            with contextlib.suppress(LinkLost), _as_link_lost():
                self.agent.deregister_memory(registered)
        self._registered = []
        del self.agent  # the last reference: ends its threads and connections


class NixlSource:
    """Lets readers read `memory`, one agent for each link."""

    name = "nixl"

    def __init__(self, memory: PoolMemory) -> None:
        self._memory = memory
        self._links: dict[str, tuple[_Memory, Bytes]] = {}
        try:
            _agent(serves=False)  # fails here, at the start, where nixl cannot be used
        except LinkLost as error:
            raise ConfigError(str(error)) from error

    def open_link(self, link: str) -> bytes:
        memory, nonce = self._memory, secrets.token_bytes(_NONCE_BYTES)
        lies = np.frombuffer(nonce, np.uint8).copy()
        registered = _Memory(memory, lies, serves=True)
        try:
            metadata = registered.metadata()
        except BaseException:
            registered.close()
            raise
        self._links[link] = registered, lies
        head = _PROOF.pack(
            _MAGIC,
            nonce,
            lies.ctypes.data,
            memory.num_blocks,
            memory.slab_bytes,
            memory.generations.ctypes.data,
            memory.address(0),
            -1 if memory.cuda is None else memory.cuda.index,
        )
        return _sealed(head + metadata)

    def close_link(self, link: str) -> None:
        registered, _ = self._links.pop(link, (None, None))
        if registered is not None:
            registered.close()

    def close(self) -> None:
        for link in list(self._links):
            self.close_link(link)


class NixlReader:
    """Reads a peer's pool into our own."""

    remark = ""

    def __init__(self, proof: bytes, target: Target) -> None:
        """Does not connect yet. `MalformedMessage` if the proof is not one of ours."""
        body = proof[:-_SUM_BYTES]
        if len(body) <= _PROOF.size or not body.startswith(_MAGIC) or _sealed(body) != proof:
            raise MalformedMessage("not a proof of this nixl transport", param="proofs")
        (
            _,
            self._nonce,
            self._nonce_at,
            self._num_blocks,
            slab_bytes,
            self._generations_at,
            self._slabs_at,
            device,
        ) = _PROOF.unpack_from(proof)
        if slab_bytes != target.source_slab_bytes:
            raise MalformedMessage("the peer's slabs have another size", param="slab_bytes")
        self._target = target
        self._kind = "DRAM" if device < 0 else "VRAM"
        self._device: int = max(device, 0)
        self._own = np.zeros(max(_BATCH * 8, _NONCE_BYTES), np.uint8)
        self._generations = self._own[: _BATCH * 8].view(np.int64)
        self._lock = threading.Lock()  # held by whoever uses the agent
        self._stop = threading.Event()
        self._memory: _Memory | None = _Memory(target.memory, self._own, serves=False)
        self._peer = ""
        try:
            with _as_link_lost():
                self._peer = self._memory.agent.add_remote_agent(body[_PROOF.size :])
        except BaseException:
            self._end()
            raise

    @classmethod
    def open(cls, link: str, proof: bytes, target: Target) -> NixlReader:
        """Connect, and read the nonce out of the memory of the process that made it."""
        reader = cls(proof, target)
        try:
            with reader._lock:
                here = reader._own.ctypes.data
                reader._read(
                    [(here, _NONCE_BYTES)], [(reader._nonce_at, _NONCE_BYTES)], "DRAM", "DRAM", OPEN_TIMEOUT
                )
            if reader._own[:_NONCE_BYTES].tobytes() != reader._nonce:
                raise LinkLost("the memory at the other end is another process's")
        except BaseException:
            reader.close()
            raise
        return reader

    def pull(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if not 0 <= piece.slot < self._num_blocks:
                raise MalformedMessage(f"the peer's pool has no block {piece.slot}", param="slots")
        for start in range(0, len(pieces), _BATCH):
            batch = pieces[start : start + _BATCH]
            with self._lock:
                self._require_unchanged(batch)
                local, remote = self._places(batch)
                kind, _ = _place(self._target.memory)
                self._read(local, remote, kind, self._kind, STALL_TIMEOUT)
                self._require_unchanged(batch)
            for piece in batch:
                self._target.check(piece)

    def _places(self, pieces: Sequence[Piece]) -> tuple[Ranges, Ranges]:
        memory = self._target.memory
        local: Ranges = []
        remote: Ranges = []
        for piece in pieces:
            into = memory.address(piece.block)
            source = self._slabs_at + piece.slot * self._target.source_slab_bytes
            for offset, length in self._target.ranges(piece):
                local.append((into + offset, length))
                remote.append((source + offset, length))
        return local, remote

    def _require_unchanged(self, pieces: Sequence[Piece]) -> None:
        """Read the pieces' generations out of the source's memory, and compare."""
        here = self._generations.ctypes.data
        local = [(here + 8 * i, 8) for i in range(len(pieces))]
        remote = [(self._generations_at + 8 * piece.slot, 8) for piece in pieces]
        self._generations[:] = -1
        self._read(local, remote, "DRAM", "DRAM", STALL_TIMEOUT)
        for piece, generation in zip(pieces, self._generations.tolist(), strict=False):
            if generation != piece.generation or generation % 2:
                raise StaleBlock(f"block {piece.index} was reused while it was being copied")

    def _read(self, local: Ranges, remote: Ranges, local_kind: str, remote_kind: str, timeout: float) -> None:
        """Run one READ to its end. When this raises, nothing more is written to our memory."""
        if self._stop.is_set() or self._memory is None:
            raise LinkLost("the link was closed")
        agent = self._memory.agent
        _, device = _place(self._target.memory)
        handle = None
        try:
            with _as_link_lost():
                handle = agent.initialize_xfer(
                    "READ",
                    agent.get_xfer_descs(_on(local, local_kind, device), local_kind),
                    agent.get_xfer_descs(_on(remote, remote_kind, self._device), remote_kind),
                    self._peer,
                )
                self._wait(agent, handle, timeout)
                handle.release()
            return
        except LinkLost as error:
            reason = str(error)
        # What failed may still be under way. It is cancelled, or ends with its agent, of which no
        # reference may be left: out here not even the error's traceback has one.
        if handle is not None:
            with contextlib.suppress(LinkLost), _as_link_lost():
                handle.release()
        del handle, agent
        self._end()
        raise LinkLost(reason)

    def _wait(self, agent: Any, handle: Any, timeout: float) -> None:
        state, began = agent.transfer(handle), time.monotonic()
        while state == "PROC":
            waited = time.monotonic() - began
            if waited > timeout:
                raise LinkLost("the source's memory does not answer")
            if waited > _SPIN and self._stop.wait(0.0002):
                raise LinkLost("the link was closed")
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise LinkLost("the source's memory cannot be read any more")

    def _end(self) -> None:
        """End the agent: nothing writes to our pool over this link any more."""
        memory, self._memory = self._memory, None
        if memory is not None:
            if self._peer:
                with contextlib.suppress(LinkLost), _as_link_lost():
                    memory.agent.remove_remote_agent(self._peer)
            memory.close()

    def close(self) -> None:
        self._stop.set()
        with self._lock:
            self._end()


def _place(memory: PoolMemory) -> tuple[str, int]:
    """The kind and the device of a pool's slabs, as nixl names them."""
    return ("DRAM", 0) if memory.cuda is None else ("VRAM", memory.cuda.index)


def _on(ranges: Ranges, kind: str, device: int) -> list[tuple[int, int, int]]:
    """Ranges with their device, in nixl's form."""
    return [(*place, device if kind == "VRAM" else 0) for place in ranges]


@contextlib.contextmanager
def _as_link_lost() -> Iterator[None]:
    """Turn whatever nixl raises into `LinkLost`: the other end cannot be read."""
    try:
        yield
    except PdqError:
        raise
    except BaseException as error:
        raise LinkLost(f"nixl: {type(error).__name__} {error}") from error
