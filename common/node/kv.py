"""Where the engine's pool and the transfer layer meet: memory, generations, reservations.

Owns: the shared memory that backs the pool, when a block's generation changes and its digest is
computed, and room that is reserved for prompts on their way in. All methods belong to the event
loop's thread, as the pool does.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence as AnySequence

import torch
from torch import Tensor

from common.engine import Engine
from common.engine.sequence import Sequence
from common.errors import NeverFits, OutOfBlocks
from common.messages import Offer
from kv_transfer.cuda_runtime import CudaRuntime
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.digests import tail_seed
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.ports import Piece, ReadyBlock, Reservation

WARM_BYTES = 128 << 20  # of the pool, touched at the start


class SharedMemory:
    """Pool memory that other processes may map; give `allocate` and `freed` to the engine."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.memory: PoolMemory | None = None

    def allocate(self, num_blocks: int, slab_bytes: int) -> Tensor:
        """The blocks that are used first are touched meanwhile; the others cost what they cost, so
        that a pool which is larger than what is asked of it does not fill the machine."""
        if self._device.type == "cuda":
            index = self._device.index or 0
            self.memory = DevicePoolMemory(num_blocks, slab_bytes, index, CudaRuntime())
            return self.memory.slabs
        self.memory = PoolMemory(num_blocks, slab_bytes, warm=False)
        warm = functools.partial(self.memory.warm, WARM_BYTES)
        threading.Thread(target=warm, name="kv-warm", daemon=True).start()
        return self.memory.slabs

    def freed(self, block_ids: AnySequence[int]) -> None:
        """The content of these blocks is garbage from now on: a copy under way will be stale."""
        assert self.memory is not None
        for block in block_ids:
            self.memory.begin_write(block)


class NodeKV:
    """The node's side of both ends of a handoff. Implements `ports.IntakePool`."""

    def __init__(self, engine: Engine, memory: PoolMemory, *, digests: bool) -> None:
        self.engine = engine
        self.memory = memory
        self._digests = digests
        self.num_reserved = 0  # prompts that have room here and are not adopted yet

    # Sending.

    def ready_blocks(
        self, sequence: Sequence, table: AnySequence[int], start: int, end: int
    ) -> list[ReadyBlock]:
        """Blocks `start` to `end` of a sequence, all computed; the last may be its tail.

        `table` are its blocks, which it may have given up already. Each is sealed: its digest is
        computed once, seeded with its block hash.
        """
        block_size = self.engine.layout.block_size
        num_full = sequence.num_computed // block_size
        hashes = sequence.hashes(num_full, block_size)
        ready = []
        for index in range(start, end):
            slot = table[index]
            if index < num_full:
                generation = self._seal(slot, hashes[index])
            else:
                tokens = sequence.token_ids[index * block_size : sequence.num_computed]
                parent = hashes[-1] if hashes else sequence.cache_root
                ranges = list(self.engine.layout.tail_ranges(len(tokens)))
                seed = tail_seed(parent, tokens) if self._digests else b""
                generation = self.memory.seal(slot, seed, ranges)
            ready.append(ReadyBlock(index, slot, generation, self.memory.digests[slot]))
        return ready

    def _seal(self, slot: int, block_hash: bytes) -> int:
        """A block of the prefix cache that was sealed before keeps its digest."""
        generation = int(self.memory.generations[slot])
        if self.memory.digests[slot] and generation % 2 == 0:
            return generation
        return self.memory.seal(slot, block_hash if self._digests else b"")

    def go_on_writing(self, sequence: Sequence) -> None:
        """A sequence whose blocks were `ready` gets more positions: its tail is open again."""
        index, fill = divmod(sequence.num_computed, self.engine.layout.block_size)
        if fill:
            self.memory.begin_write(sequence.block_table[index])

    # Receiving.

    def reserve(self, offer: Offer, /) -> Reservation | None:
        """Room for all of the prompt and a place among the running sequences, or None now."""
        engine, pool = self.engine, self.engine.pool
        length = len(offer.token_ids)
        most = offer.prompt_len + offer.params.max_tokens
        if pool.blocks_for(most - 1) > pool.num_blocks or most > engine.max_model_len:
            raise NeverFits(f"{most} positions never fit this node", param="max_tokens")
        if engine.scheduler.num_free_slots <= self.num_reserved:
            return None
        held = pool.match(offer.block_hashes)
        lacking = pool.blocks_for(length) - len(held)
        spare = engine.scheduler.num_running  # each may need its next block before long
        busy = spare > 0 or self.num_reserved > 0
        if lacking + (spare if busy else 0) > pool.num_free:
            pool.release(held)
            return None
        try:
            fresh = pool.allocate(lacking)
        except OutOfBlocks:
            pool.release(held)
            return None
        self.num_reserved += 1
        missing = tuple(range(len(held), len(held) + lacking))
        return Reservation((*held, *fresh), missing)

    def landed(self, reservation: Reservation, piece: Piece, /) -> None:
        if not piece.fill:
            self.engine.pool.publish(piece.block, piece.seed)

    def adopt(self, reservation: Reservation, /) -> None:
        self.num_reserved -= 1

    def discard(self, reservation: Reservation, /) -> None:
        self.num_reserved -= 1
        self.engine.pool.release(reservation.blocks)
