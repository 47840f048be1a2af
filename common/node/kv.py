"""Joins the engine's pool and the transfer layer: memory, generations, reservations.

Owns: the shared memory that backs the pool, when a block's generation changes and its digest is
computed, and room that is reserved for prompts on their way in. All methods but `seal` belong to
the event loop's thread, as the pool does.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable
from collections.abc import Sequence as AnySequence

import torch
from torch import Tensor

from common.engine import Engine
from common.engine.core.admission import ExpectedPrompt, Room
from common.engine.core.sequence import Sequence
from common.engine.core.step import Chunk
from common.errors import ConfigError, InvalidRequest, NeverFits
from common.wire.message import HandoffKey
from common.wire.messages import Offer
from kv_transfer.cuda_runtime import CudaRuntime
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.digests import tail_seed
from kv_transfer.pool_memory import HostPoolMemory, PoolMemory
from kv_transfer.ports import Piece, ReadyBlock, Reservation

WARM_BYTES = 128 << 20  # of the pool, touched at the start


def _host_pool(device: torch.device, num_blocks: int, slab_bytes: int) -> PoolMemory:
    """Touches the blocks that are used first, in a thread. The others take memory when they are used, so
    that a pool which is larger than its use does not fill the machine."""
    memory = HostPoolMemory(num_blocks, slab_bytes, warm=False)
    warm = functools.partial(memory.warm, WARM_BYTES)
    threading.Thread(target=warm, name="kv-warm", daemon=True).start()
    return memory


def _cuda_pool(device: torch.device, num_blocks: int, slab_bytes: int) -> PoolMemory:
    return DevicePoolMemory(num_blocks, slab_bytes, CudaRuntime(device.index or 0))


# By the type of the device on which the slabs lie.
POOLS: dict[str, Callable[[torch.device, int, int], PoolMemory]] = {"cpu": _host_pool, "cuda": _cuda_pool}


class SharedMemory:
    """Pool memory that other processes may map; give `allocate` and `freed` to the engine."""

    def __init__(self) -> None:
        self.memory: PoolMemory | None = None

    def allocate(self, device: torch.device, num_blocks: int, slab_bytes: int) -> Tensor:
        """Allocate the pool on the engine's device. `ConfigError` if no peer could read it there."""
        if device.type not in POOLS:
            raise ConfigError(
                f"blocks on {device.type} cannot be handed over; those on {', '.join(POOLS)} can",
                param="device",
            )
        self.memory = POOLS[device.type](device, num_blocks, slab_bytes)
        return self.memory.slabs

    def freed(self, block_ids: AnySequence[int]) -> None:
        """Mark the content of these blocks as garbage: copies of it that are under way become stale."""
        assert self.memory is not None
        for block in block_ids:
            self.memory.begin_write(block)


@dataclasses.dataclass(frozen=True, slots=True)
class Seal:
    """A block that a step fills, and its digest's seed; `ranges`: what it covers of a tail. A digest that is
    known already is not computed."""

    slot: int
    seed: bytes  # b"": no digest
    ranges: AnySequence[tuple[int, int]] = ()
    digest: bytes = b""


class NodeKV:
    """The node's side of both ends of a handoff. Implements `ports.IntakePool`."""

    def __init__(self, engine: Engine, memory: PoolMemory, *, digests: bool) -> None:
        self.engine = engine
        self.memory = memory
        self._digests = digests
        layout = engine.layout
        self._whole = layout.without_draft.ranges() if layout.num_draft else []
        self._first: tuple[HandoffKey, ExpectedPrompt] | None = None  # of the offers that wait for room
        self._rooms: dict[Reservation, Room] = {}

    # Sending.

    def seals(self, chunk: Chunk) -> list[Seal]:
        """What to seal once `chunk` is computed: the blocks that it completes, and the tail if it
        reaches the last known token."""
        sequence, block_size = chunk.sequence, self.engine.layout.block_size
        end = chunk.end // block_size
        if chunk.samples:
            end = -(-chunk.end // block_size)
        table = sequence.block_table
        return self._seals(sequence, table, chunk.start // block_size, end, chunk.end)

    def _seals(
        self, sequence: Sequence, table: AnySequence[int], start: int, end: int, computed: int
    ) -> list[Seal]:
        """The seals of blocks `start` to `end` of a sequence with `computed` positions; the last may be a
        tail."""
        block_size = self.engine.layout.block_size
        hashes = sequence.hashes(computed // block_size, block_size)
        on = self._digests
        seals = [
            Seal(table[index], hashes[index] if on else b"", digest=self._digest_of(hashes[index]))
            for index in range(start, min(end, len(hashes)))
        ]
        if end > len(hashes):
            tokens = sequence.token_ids[len(hashes) * block_size : computed]
            parent = hashes[-1] if hashes else sequence.cache_root
            seed = tail_seed(parent, tokens) if on else b""
            ranges = self.engine.layout.without_draft.ranges(len(tokens))
            seals.append(Seal(table[len(hashes)], seed, ranges))
        return seals

    def _digest_of(self, block_hash: bytes) -> bytes:
        """Of the sealed block that is cached under a hash. Another one with that hash has the same content: a
        copy whose original was spoiled before is to be found out by this digest."""
        memory, slot = self.memory, self.engine.pool.published(block_hash)
        return b"" if slot is None or memory.generations[slot] % 2 else memory.digests[slot]

    def unsealed(self, sequence: Sequence, table: AnySequence[int]) -> list[Seal]:
        """The full, computed blocks of a sequence that were never sealed: they arrived with it, or it did
        not compute them for another node. The sequence may run: it writes into no full block. `table` as
        in `ready_blocks`."""
        computed = min(sequence.num_computed, len(table) * self.engine.layout.block_size)
        full = computed // self.engine.layout.block_size
        seals = self._seals(sequence, table, 0, full, computed)
        return [seal for seal in seals if not self._is_sealed(seal)]

    def _is_sealed(self, seal: Seal) -> bool:
        """Whether a block is sealed. A tail never counts: it may hold more by now than when it was."""
        memory, slot = self.memory, seal.slot
        return bool(
            not seal.ranges and memory.generations[slot] % 2 == 0 and (memory.digests[slot] or not seal.seed)
        )

    def seal(self, seals: Iterable[Seal]) -> None:
        """Compute the digest of each block, once; nobody writes into it any more.

        For any thread, while somebody holds the blocks and nobody writes into them.
        """
        for seal in seals:
            if seal.digest:
                self.memory.digests[seal.slot] = seal.digest
            seed = b"" if seal.digest else seal.seed
            self.memory.seal(seal.slot, seed, seal.ranges or self._whole)

    def ready_blocks(
        self, sequence: Sequence, table: AnySequence[int], start: int, end: int, computed: int
    ) -> list[ReadyBlock]:
        """Blocks `start` to `end` of a sequence, of which `computed` positions are computed; the
        last may be its tail. `table` are its blocks, which it may have given up already.

        A full block that was sealed before, by its step or for another prompt, keeps its digest.
        """
        memory = self.memory
        seals = self._seals(sequence, table, start, end, computed)
        self.seal(seal for seal in seals if not self._is_sealed(seal))
        return [
            ReadyBlock(index, s.slot, int(memory.generations[s.slot]), memory.digests[s.slot])
            for index, s in enumerate(seals, start)
        ]

    def go_on_writing(self, sequence: Sequence) -> None:
        """Open the tail of a sequence again: its blocks were `ready`, and it gets more positions."""
        index, fill = divmod(sequence.num_computed, self.engine.layout.block_size)
        if fill:
            self.memory.begin_write(sequence.block_table[index])

    # Receiving.

    @property
    def num_reserved(self) -> int:
        """Number of prompts that have room here and do not run yet."""
        return len(self._rooms)

    def reserve(self, offer: Offer, /) -> Reservation | None:
        """Hold a slot and blocks for the whole prompt until `run` or `discard`."""
        engine, key = self.engine, offer.key
        if self._first is None or self._first[0] != key:
            try:
                prompt = engine.expect(
                    len(offer.request.token_ids),
                    offer.request.prompt_len,
                    offer.request.params,
                    block_hashes=offer.block_hashes,
                    priority=offer.request.priority,
                    arrival=self._first[1].order[1] if self._first is not None else None,
                )
            except InvalidRequest as error:
                raise NeverFits(error.message, param=error.param) from error
            self._first = (key, prompt)
        room = engine.scheduler.hold(self._first[1])
        if room is None:
            return None
        self._first = None
        missing = tuple(range(room.num_cached, len(room.blocks)))
        reservation = Reservation(tuple(room.blocks), missing)
        self._rooms[reservation] = room
        return reservation

    def withdraw(self, offer: Offer, /) -> None:
        if self._first is not None and self._first[0] == offer.key:
            self._first = None
            self.engine.scheduler.forget()

    def landed(self, reservation: Reservation, piece: Piece, /) -> None:
        pool = self.engine.pool
        if piece.fill:
            pool.fill([piece.block], 0, piece.fill)
        else:
            pool.publish(piece.block, piece.seed)

    def adopt(self, reservation: Reservation, /) -> None:
        """The room stays held until whoever hears of the arrival calls `run` or `discard`."""

    def run(self, sequence: Sequence, reservation: Reservation) -> None:
        """Run a sequence whose prompt has landed in its room. An error changes nothing."""
        self.engine.scheduler.adopt(sequence, self._rooms[reservation])
        del self._rooms[reservation]

    def discard(self, reservation: Reservation, /) -> None:
        self.engine.scheduler.release(self._rooms.pop(reservation))
