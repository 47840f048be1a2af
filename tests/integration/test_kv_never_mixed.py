"""KV is never mixed up: thousands of random handoffs over the real transports and real pool memory.

Three nodes hand over to each other in one process: real `Links`, `Leases`, `PoolMemory`, and the real
readers and sources of `shm` and `tcp`, over a bus that delays, duplicates, reorders, loses and is
cut. The pools are small and shared prefixes are common, so that blocks are evicted and reused all
the time, also while a peer whose link is down still copies them.

A block's content is a function of its token ids: every position holds numbers made from the tokens
up to it, whatever block it lies in, so that nodes of other block sizes can be compared. Whoever
adopts a sequence reads every filled position of every block, at once and again later, and compares;
whoever computes does so with the blocks that its prefix cache gave it.

Either end aborts now and then, and what did not arrive is tried again, to another node perhaps.
`PDQ_HANDOFFS` asks for more requests than `make test` runs. The rules are then taken out one at a
time, in the real code: each must be noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import functools
import os
import random
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import pytest

from common.errors import DigestMismatch, LinkLost, StaleBlock
from common.kv_layout import Fingerprint, KVLayout, root_hash
from common.wire.bus import new_secret_key
from common.wire.message import HandoffKey, Message
from common.wire.messages import Offer
from kv_transfer import pool_memory
from kv_transfer.conversion import Conversion
from kv_transfer.copy_batch import CopyBatch
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.digests import tail_seed
from kv_transfer.generations import MappedGenerations
from kv_transfer.lease import Leases
from kv_transfer.link import Links
from kv_transfer.pool_memory import HostPoolMemory, PoolMemory
from kv_transfer.ports import (
    Adopted,
    Ended,
    Granted,
    Outcome,
    Piece,
    ReadyBlock,
    Reservation,
    TransferSettings,
)
from kv_transfer.transports import shm, tcp
from kv_transfer.transports.base import Opener, Places, Source, Target
from kv_transfer.transports.converting import ConvertingReader
from kv_transfer.transports.cuda_ipc import CudaIpcReader, CudaIpcSource
from kv_transfer.transports.nccl import NcclReader, NcclSource, Turns
from kv_transfer.transports.shm import ShmReader, ShmSource
from kv_transfer.transports.tcp import TcpReader, TcpSource
from kv_transfer.transports.tcp_stream import ReceivingStream
from tests.support.asked import a_request
from tests.support.fake_cuda import FakeCuda, FakeStream
from tests.support.fake_nccl import FakeNccl
from tests.support.hashes import chain_hashes
from tests.support.protocol import mutations
from tests.support.redis import HANGS_S

HANDOFFS = int(os.environ.get("PDQ_HANDOFFS", "2000"))
BLOCK = 4
POSITIONS = 56  # in each pool
LAYOUT = KVLayout.paged_attention(
    num_layers=2, num_kv_heads=4, head_dim=64, block_size=BLOCK, dtype="float32"
)
SEGMENTS, WORDS = len(LAYOUT.segments), LAYOUT.slab_bytes // 8 // BLOCK // len(LAYOUT.segments)
FINGERPRINT = Fingerprint("model", "rev", LAYOUT.describe(), "numerics", BLOCK)
ALIKE, CONVERTING = (BLOCK, BLOCK, BLOCK), (4, 6, 3)  # block sizes of the three nodes
SETTINGS = TransferSettings(credits=4, repeat=0.03, answer=1.0, patience=0.2, quiet=0.2, copy_blocks=3)

ON_DEVICE = ("cuda_ipc", "tcp+staged", "nccl")
KEY_PAIR = new_secret_key()
POISON = 0xA5
NEVER = HANGS_S


class Mixed(AssertionError):
    """A block does not hold what its token ids say, or what must be free is not."""


@functools.lru_cache(256)
def identities(tokens: tuple[int, ...], size: int) -> tuple[bytes, ...]:
    """Of every block of so many positions: its hash; of a tail, what stands for it."""
    root = root_hash(dataclasses.replace(FINGERPRINT, block_size=size))
    names = chain_hashes(root, tokens, size, len(tokens))
    if fill := len(tokens) % size:
        names.append(tail_seed(names[-1] if names else root, tokens[-fill:]))
    return tuple(names)


@functools.lru_cache(256)
def content(tokens: tuple[int, ...]) -> np.ndarray:
    """What every position holds, in each segment: `[segments, positions, words]`."""
    names = chain_hashes(b"", tokens, 1, len(tokens))
    seeds = np.array([int.from_bytes(name[:8], "little") for name in names], np.uint64)
    ramp = np.arange(SEGMENTS * WORDS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ramp.reshape(SEGMENTS, 1, WORDS) + seeds.reshape(1, -1, 1)


class Pool:
    """Counts references, keeps freed blocks as prefix cache until it needs them, oldest first."""

    def __init__(self, memory: PoolMemory, layout: KVLayout) -> None:
        self.memory, self.layout, self.size = memory, layout, layout.block_size
        self.references = [0] * memory.num_blocks
        self.cached: dict[bytes, int] = {}
        self.name_of: dict[int, bytes] = {}
        self.freed: dict[int, None] = dict.fromkeys(range(memory.num_blocks))

    def acquire(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] += 1
            self.freed.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] < 0:
                raise Mixed("released too often")
            if not self.references[block]:
                self.freed[block] = None

    def take(self, names: Sequence[bytes], full: int) -> tuple[list[int], int] | None:
        """Blocks for these identities, and how many of the first came from the cache."""
        held: list[int] = []
        for name in names[:full]:
            if name not in self.cached:
                break
            held.append(self.cached[name])
        self.acquire(held)
        lacking = len(names) - len(held)
        if lacking > len(self.freed):
            self.release(held)
            return None
        fresh = list(self.freed)[:lacking]
        self.acquire(fresh)
        for block in fresh:
            self.memory.begin_write(block)
            self.cached.pop(self.name_of.pop(block, b""), None)
            self.memory.slabs[block] = POISON
        return [*held, *fresh], len(held)

    def positions(self, block: int) -> np.ndarray:
        """What a block holds, `[segments, size, words]`."""
        slab = self.memory.slabs[block].numpy().view(np.uint64)
        return slab.reshape(SEGMENTS, self.size, WORDS)

    def write(self, block: int, index: int, tokens: tuple[int, ...]) -> None:
        """Block `index` of a prompt is computed."""
        values = content(tokens)[:, index * self.size : (index + 1) * self.size]
        name, filled = identities(tokens, self.size)[index], values.shape[1]
        self.positions(block)[:, :filled] = values
        is_tail = filled < self.size
        self.memory.seal(block, name, self.layout.ranges(filled) if is_tail else [])
        if not is_tail:
            self.publish(block, name)

    def publish(self, block: int, name: bytes) -> None:
        if name not in self.cached:
            self.cached[name], self.name_of[block] = block, name

    def check(self, blocks: Sequence[int], tokens: tuple[int, ...]) -> None:
        """Every filled position of every block is what the tokens say."""
        if len(blocks) != len(identities(tokens, self.size)):
            raise Mixed(f"{len(blocks)} blocks for {len(tokens)} positions")
        for index, block in enumerate(blocks):
            wanted = content(tokens)[:, index * self.size : (index + 1) * self.size]
            if not np.array_equal(self.positions(block)[:, : wanted.shape[1]], wanted):
                raise Mixed(f"block {index} holds another content")

    # IntakePool

    def reserve(self, offer: Offer) -> Reservation | None:
        taken = self.take(identities(offer.request.token_ids, self.size), len(offer.block_hashes))
        if taken is None:
            return None
        blocks, cached = taken
        return Reservation(tuple(blocks), tuple(range(cached, len(blocks))))

    def withdraw(self, offer: Offer) -> None: ...

    def landed(self, reservation: Reservation, piece: Piece) -> None:
        self.memory.seal(piece.block, b"" if piece.digest else piece.seed)  # converted: its own
        if piece.digest:
            self.memory.digests[piece.block] = piece.digest
        if not piece.fill:
            self.publish(piece.block, piece.seed)

    def adopt(self, reservation: Reservation) -> None: ...

    def discard(self, reservation: Reservation) -> None:
        self.release(reservation.blocks)


class Air:
    """The bus of all nodes: late, twice, in another order, or not at all; and cut now and then."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.nodes: dict[str, Node] = {}
        self.faults = True
        self.aborts = 40  # one prompt in so many blocks is aborted
        self.cuts = 0
        self.adopted: set[HandoffKey] = set()
        self.connections: dict[frozenset[str], int] = {}
        self.cuda = FakeCuda(seed=seed)
        self.nccl = FakeNccl(self.cuda)

    def name(self, a: str, b: str) -> str:
        pair = frozenset((a, b))
        return f"{'-'.join(sorted(pair))}#{self.connections.setdefault(pair, 0)}"

    def cut(self, a: str, b: str) -> None:
        """A new connection takes the place of the old one; both ends hear of it, not at once."""
        lost = self.name(a, b)
        self.cuts += 1
        self.connections[frozenset((a, b))] += 1
        for node in (a, b):
            late = self.random.random() * self.random.choice((0.002, 0.03))
            asyncio.get_running_loop().call_later(late, self.nodes[node].links.connection_lost, lost)

    def send(self, source: str, peer: str, message: Message, link: str | None) -> None:
        connection = self.name(source, peer)
        if link not in (None, connection):
            raise LinkLost("cut")
        draw = self.random.random() if self.faults else 1.0
        if draw < 0.02:
            return
        loop, receive = asyncio.get_running_loop(), self.nodes[peer].links.receive
        for _ in range(2 if draw < 0.08 else 1):
            late = self.random.random() * 0.004 if self.faults else 0.0
            loop.call_later(late, receive, source, connection, message)


class Port:
    """One node's end of the air."""

    def __init__(self, air: Air, name: str) -> None:
        self.air, self.name = air, name

    def send(self, peer: str, message: Message, *, link: str | None = None) -> None:
        self.air.send(self.name, peer, message, link)

    def link(self, peer: str) -> str | None:
        return self.air.name(self.name, peer)

    def disconnect(self, peer: str) -> None:
        self.air.cut(self.name, peer)


class Node:
    def __init__(self, air: Air, name: str, transport: str, size: int, digests: bool) -> None:
        self.air, self.name, self.size, self.digests = air, name, size, digests
        layout = LAYOUT.with_block_size(size)
        count, cuda, nccl, turns = POSITIONS // size, air.cuda, air.nccl, Turns()
        self.memory: PoolMemory = (
            DevicePoolMemory(count, layout.slab_bytes, cuda)
            if transport in ON_DEVICE
            else HostPoolMemory(count, layout.slab_bytes)
        )
        self.pool = Pool(self.memory, layout)
        self.leases = Leases(self.pool)
        self.ended: dict[HandoffKey, asyncio.Future[Ended]] = {}
        self.adopted = 0
        self.decoding: set[asyncio.Task[None]] = set()
        self.failure: BaseException | None = None
        key = KEY_PAIR if transport == "tcp+curve" else ""
        make_source: dict[str, Callable[[], Source]] = {
            "shm": lambda: ShmSource(self.memory),
            "cuda_ipc": lambda: CudaIpcSource(self.memory),  # type: ignore[arg-type]
            "nccl": lambda: NcclSource(self.memory, layout, self.leases, cuda, nccl, turns),
        }
        make_tcp = functools.partial(TcpSource, self.memory, layout, self.leases, secret_key=key)
        source = make_source.get(transport, make_tcp)()
        openers: dict[str, Opener] = {
            "shm": ShmReader.open,
            "cuda_ipc": functools.partial(CudaIpcReader.open, cuda=cuda),
            "nccl": functools.partial(NcclReader.connect, cuda=cuda, nccl=nccl, turns=turns),
            "tcp": functools.partial(TcpReader.open, secret_key=key),
        }
        self.links = Links(
            Port(air, name),
            name,
            dataclasses.replace(FINGERPRINT, block_size=size),
            Target(self.memory, layout),
            pool=self.pool,
            leases=self.leases,
            make_transports=lambda: ([source], openers),
            on_arrival=self.arrived,
            on_intake_ended=lambda _: None,
            settings=SETTINGS,
        )
        air.nodes[name] = self
        self.links.start()

    def heard(self, effect: Granted | Ended) -> None:
        if isinstance(effect, Ended):
            arrived = effect.key in self.air.adopted
            if effect.outcome is not Outcome.LINK_LOST and arrived != (effect.outcome is Outcome.ADOPTED):
                self.failure = Mixed(f"arrived: {arrived}, here: {effect.outcome.value}")
            future = self.ended[effect.key]
            if not future.done():
                future.set_result(effect)

    def arrived(self, adopted: Adopted) -> None:
        self.adopted += 1
        self.air.adopted.add(adopted.key)
        task = asyncio.get_running_loop().create_task(self.decode(adopted))
        self.decoding.add(task)
        task.add_done_callback(self.decoding.discard)

    def changed(self) -> None:
        self.links.room_changed()

    async def decode(self, adopted: Adopted) -> None:
        """Read all of it, twice."""
        blocks, tokens = adopted.reservation.blocks, adopted.offer.request.token_ids
        try:
            self.pool.check(blocks, tokens)
            await asyncio.sleep(self.air.random.random() * 0.01)
            self.pool.check(blocks, tokens)
        except Mixed as mixed:
            self.failure = self.failure or mixed
        finally:
            self.pool.release(blocks)
            self.changed()

    def give_up(self, key: HandoffKey) -> None:
        """The receiving end aborts, if it has anything of this handoff."""
        self.links.refuse(lambda offer: offer.key == key, "given_up")

    async def prefill(self, request: str, attempt: int, tokens: tuple[int, ...], to: str) -> bool:
        """One attempt: compute chunk by chunk, announce, commit; either end aborts at times. Room is
        waited for. Whether it arrived, as far as this end knows."""
        rng = self.air.random
        names, full = identities(tokens, self.size), len(tokens) // self.size
        try:
            async with asyncio.timeout(NEVER):
                link = await self.links.open(to)
                while (taken := self.pool.take(names, full)) is None:  # noqa: ASYNC110  (any release)
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise Mixed("room is never given back") from None
        blocks, cached = taken
        key = HandoffKey(link, request, attempt, 0)
        ended = self.ended[key] = asyncio.get_running_loop().create_future()
        try:
            self.pool.check(blocks[:cached], tokens[: cached * self.size])
            offer = Offer(key, a_request(tokens, name=request), names[:full], len(tokens) % self.size, 0)
            try:
                self.links.offer(offer, self.heard)
            except LinkLost:
                return False
            if self.air.faults and rng.randrange(2 * self.air.aborts) == 0:
                loop = asyncio.get_running_loop()
                loop.call_later(rng.random() * 0.02, self.air.nodes[to].give_up, key)
            computed, abort_at = 0, rng.randrange(self.air.aborts) if self.air.faults else 99
            while computed < len(names) and not ended.done():
                end = min(len(names), computed + rng.randrange(1, 4))
                ready = []
                for index in range(computed, end):
                    slot = blocks[index]
                    if index >= cached:
                        self.pool.write(slot, index, tokens)
                    generation = int(self.memory.generations[slot])
                    digest = self.memory.digests[slot] if self.digests else b""
                    ready.append(ReadyBlock(index, slot, generation, digest))
                self.links.announce(key, ready)
                if computed <= abort_at < end:
                    self.links.cancel(key, "aborted")
                computed = end
                await asyncio.sleep(rng.random() * 0.002)
            if not ended.done() and computed == len(names):
                self.links.commit(key, position=len(tokens), first_token=1, logprobs=None)
        finally:
            self.pool.release(blocks)  # from here on only the lease holds them
            self.changed()
        try:
            end = await asyncio.wait_for(ended, NEVER)
        except TimeoutError:
            raise Mixed("a handoff never ends") from None
        return end.outcome is Outcome.ADOPTED

    async def quiet(self) -> None:
        deadline = asyncio.get_running_loop().time() + NEVER
        while True:
            if not (
                any(self.leases.count().values())
                or self.links.intakes()
                or self.links.handoffs()
                or self.decoding
            ):
                break
            if asyncio.get_running_loop().time() > deadline:
                raise Mixed("something never ends")
            await asyncio.sleep(0.01)
        if any(self.pool.references):
            raise Mixed("blocks are left in use")
        if self.failure is not None:
            raise self.failure


@contextlib.asynccontextmanager
async def three_nodes(
    transport: str, seed: int, *, sizes: tuple[int, ...] = ALIKE, digests: bool = True
) -> AsyncIterator[tuple[Air, list[Node]]]:
    air = Air(seed)
    nodes = [Node(air, name, transport, size, digests) for name, size in zip("abc", sizes, strict=True)]
    try:
        yield air, nodes
    finally:
        for node in nodes:
            await node.links.close()
        for node in nodes:
            node.memory.close()
        assert (air.cuda.faults, air.cuda.left, air.nccl.left) == ([], 0, 0)


def prompts(rng: random.Random) -> tuple[int, ...]:
    """A shared beginning, one of few continuations: equal blocks and reuse are common."""
    stem = (rng.randrange(3),) * (BLOCK * rng.randrange(4))
    return stem + tuple(9 for _ in range(rng.randrange(1, 10)))


async def hand_over(
    transport: str,
    seed: int,
    count: int,
    *,
    sizes: tuple[int, ...] = ALIKE,
    digests: bool = True,
    cuts: float = 0.03,
    aborts: int = 40,
) -> int:
    """`count` random prompts between random nodes, some at once, tried up to three times each; how
    many arrived."""
    async with three_nodes(transport, seed, sizes=sizes, digests=digests) as (air, nodes):
        air.aborts = aborts
        rng = random.Random(seed)
        left = iter(range(count))

        async def some() -> None:
            for number in left:
                tokens = prompts(rng)
                for attempt in (1, 2, 3):
                    if await once(f"r{number}", attempt, tokens):
                        break

        async def once(request: str, attempt: int, tokens: tuple[int, ...]) -> bool:
            source, target = rng.sample(nodes, 2)
            if rng.random() < cuts:
                loop, pair = asyncio.get_running_loop(), (source.name, target.name)
                loop.call_later(rng.random() * 0.01, air.cut, *pair)
            arrived = False
            with contextlib.suppress(LinkLost):
                arrived = await source.prefill(request, attempt, tokens, target.name)
            for node in nodes:
                if node.failure is not None:
                    raise node.failure
                if node.links.counts["stale_block"] and not (cuts or air.cuts):
                    raise Mixed("a leased block was reused")
            return arrived

        tasks = [asyncio.create_task(some()) for _ in range(6)]
        try:
            await asyncio.gather(*tasks)
        finally:
            air.faults = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for node in nodes:
            await node.quiet()
        return sum(node.adopted for node in nodes)


@pytest.fixture(autouse=True)
def rough_copies(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Copies that may take long and tear in the middle, and may be corrupted (`flips`)."""
    rough = {"flips": 0.0, "slow": 0.2, "longest": 0.006}
    rng = random.Random(5)

    def dawdle() -> None:
        if rng.random() < rough["slow"]:
            threading.Event().wait(rng.random() * rough["longest"])

    def copy(target: int, source: int, length: int) -> None:
        half = length // 2
        ctypes.memmove(target, source, half)
        dawdle()
        ctypes.memmove(target + half, source + half, length - half)
        if rng.random() < rough["flips"]:
            ctypes.c_uint8.from_address(target).value ^= 0xFF

    read_into = ReceivingStream.read_into

    def read_in_halves(stream: ReceivingStream, view: memoryview) -> None:
        half = len(view) // 2
        read_into(stream, view[:half])
        dawdle()
        read_into(stream, view[half:])
        if rng.random() < rough["flips"]:
            view[0] ^= 0xFF

    def copy_all(stream: FakeStream, batch: CopyBatch) -> None:
        """As a device: half of each piece, then the other halves."""
        half = batch.lengths // 2
        run(stream, CopyBatch(batch.into, batch.source, half))
        dawdle()
        run(stream, CopyBatch(batch.into + half, batch.source + half, batch.lengths - half))

    run = FakeStream._run
    monkeypatch.setattr(FakeStream, "_run", copy_all)
    monkeypatch.setattr(pool_memory, "_copy", copy)
    monkeypatch.setattr(ReceivingStream, "read_into", read_in_halves)
    return rough


every_transport = pytest.mark.parametrize("transport", ["shm", "tcp", "tcp+curve"])
every_on_device = pytest.mark.parametrize("transport", ON_DEVICE)


@every_transport
async def test_whoever_adopts_a_sequence_reads_what_its_tokens_say(
    transport: str, rough_copies: dict[str, float]
) -> None:
    rough_copies["flips"] = 0.005
    arrived = await hand_over(transport, seed=1, count=HANDOFFS // 3)
    assert arrived >= HANDOFFS // 3 * 2 // 3, "most arrive, in spite of all"


@every_transport
async def test_whoever_adopts_a_sequence_that_was_converted_reads_what_its_tokens_say(
    transport: str, rough_copies: dict[str, float]
) -> None:
    rough_copies["flips"] = 0.005
    arrived = await hand_over(transport, seed=6, count=HANDOFFS // 12, sizes=CONVERTING)
    assert arrived >= HANDOFFS // 12 * 2 // 3, "most arrive, in spite of all"


@every_transport
async def test_generations_alone_keep_it_right_where_nothing_is_corrupted(transport: str) -> None:
    assert await hand_over(transport, seed=2, count=HANDOFFS // 12, digests=False)


@every_transport
async def test_a_leased_block_is_never_stale(transport: str) -> None:
    """Without cuts every announced block stands still until its handoff has ended."""
    assert await hand_over(transport, seed=3, count=HANDOFFS // 12, digests=False, cuts=0)


FEWER = {"nccl": 4}  # times: each of its links takes a while to set up


@every_on_device
async def test_on_devices_whoever_adopts_a_sequence_reads_what_its_tokens_say(transport: str) -> None:
    """Generations alone see to it: blocks there have no digests."""
    count = HANDOFFS // 8 // FEWER.get(transport, 1)
    assert await hand_over(transport, seed=7, count=count)
    assert await hand_over(transport, seed=8, count=count // 3, sizes=CONVERTING)


@every_on_device
async def test_on_devices_a_leased_block_is_never_stale(transport: str) -> None:
    assert await hand_over(transport, seed=9, count=HANDOFFS // 24 // FEWER.get(transport, 1), cuts=0)


# The test of the test: rules taken out of the real code, one at a time. Each must be noticed.


def no_generation_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shm, "require_unchanged", lambda *_: None)
    patch.setattr(Places, "require_unchanged", lambda *_: None)


def no_second_look(patch: pytest.MonkeyPatch) -> None:
    """The seqlock without its end: a copy may tear."""
    look, looked = shm.require_unchanged, set()

    def first_only(pool: MappedGenerations, piece: Piece) -> None:
        if id(piece) in looked:
            looked.discard(id(piece))
            return
        look(pool, piece)
        looked.add(id(piece))

    patch.setattr(shm, "require_unchanged", first_only)


def no_second_look_on_a_device(patch: pytest.MonkeyPatch) -> None:
    look, looked = Places.require_unchanged, weakref.WeakSet[Places]()

    def first_only(places: Places, pool: MappedGenerations) -> None:
        if places not in looked:
            look(places, pool)
        looked.add(places)

    patch.setattr(Places, "require_unchanged", first_only)


def copies_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """By the pull: they happen when it gives its stream back, after its second look."""
    close = FakeStream.close
    patch.setattr(FakeStream, "synchronize", lambda _: None)
    patch.setattr(FakeStream, "close", lambda stream: (stream.is_done(), close(stream)))


def no_digest_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Target, "check", lambda *_: None)


def lease_holds_no_reference(patch: pytest.MonkeyPatch) -> None:
    """And nobody asks what was leased, or whether it changed."""
    mutations.lease_holds_no_reference(patch)
    patch.setattr(Leases, "touch", lambda *_: True)
    patch.setattr(Leases, "untouch", lambda *_: None)
    patch.setattr(tcp.ServedLink, "_is_unchanged", lambda *_: True)


def lease_outlives_its_link(patch: pytest.MonkeyPatch) -> None:
    mutations.lease_outlives_its_link(patch)
    patch.setattr(sys.modules[__name__], "NEVER", 3.0)


def failed_intake_keeps_its_reservation(patch: pytest.MonkeyPatch) -> None:
    mutations.failed_intake_keeps_its_reservation(patch)
    patch.setattr(sys.modules[__name__], "NEVER", 3.0)


def a_position_is_copied_one_off(patch: pytest.MonkeyPatch) -> None:
    place = Conversion.place

    def shifted(self: Conversion, index: int, reservation: Reservation):
        block, spans = place(self, index, reservation)
        return block, tuple(span._replace(start=max(0, span.start - 1)) for span in spans)

    patch.setattr(Conversion, "place", shifted)


def a_block_is_whole_when_part_of_it_has_come(patch: pytest.MonkeyPatch) -> None:
    landed = Conversion.landed

    def early(self: Conversion, piece: Piece):
        for span in piece.spans:
            index = (piece.index * self._theirs + span.start) // self._ours
            self._lacking[index] = min(self._lacking[index], span.length)
        for whole in landed(self, piece):
            self._lacking[whole.index] = self._ours  # for what comes later
            yield whole

    patch.setattr(Conversion, "landed", early)


def what_failed_its_proof_is_converted(patch: pytest.MonkeyPatch) -> None:
    pull = ConvertingReader.pull

    def careless(self: ConvertingReader, pieces: Sequence[Piece]) -> None:
        with contextlib.suppress(StaleBlock, DigestMismatch):
            pull(self, pieces)
            return
        self._spread(pieces)

    patch.setattr(ConvertingReader, "pull", careless)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A rule taken out, over which transport. Where digests are on, they alone would hide it."""

    take_out: Callable[[pytest.MonkeyPatch], None]
    transport: str = "shm"
    digests: bool = False
    cuts: float = 0.03
    aborts: int = 40
    flips: float = 0.0
    slow: float = 0.2
    sizes: tuple[int, ...] = ALIKE


MUTATIONS = [
    Mutation(no_generation_check, cuts=0.2, slow=0.5),
    Mutation(no_second_look, cuts=0.2, slow=0.5),
    Mutation(no_generation_check, "cuda_ipc", cuts=0.2, slow=0.5),
    Mutation(no_second_look_on_a_device, "cuda_ipc", cuts=0.2, slow=0.5),
    Mutation(copies_are_not_waited_for, "cuda_ipc", cuts=0.2, slow=0.5),
    Mutation(no_digest_check, digests=True, flips=0.02),
    Mutation(no_digest_check, "tcp", digests=True, flips=0.02),
    Mutation(mutations.failed_copy_counts_as_good, digests=True, flips=0.02),
    Mutation(mutations.adopted_with_blocks_missing),
    Mutation(mutations.adopted_with_blocks_missing, "tcp"),
    Mutation(mutations.reservation_ends_while_a_copy_runs, cuts=0.2, slow=0.5),
    Mutation(mutations.lease_ends_with_commit, cuts=0),
    Mutation(mutations.lease_ends_with_commit, "tcp", cuts=0),
    Mutation(mutations.lease_ends_with_own_abort, cuts=0, aborts=6, slow=0.5),
    Mutation(lease_holds_no_reference, "tcp", cuts=0),
    Mutation(lease_holds_no_reference, "tcp+staged", cuts=0),
    Mutation(mutations.release_while_a_copy_runs, cuts=0, aborts=6, slow=0.5),
    Mutation(failed_intake_keeps_its_reservation, aborts=6),
    Mutation(mutations.terminal_answers_are_forgotten),
    Mutation(lease_outlives_its_link),
    Mutation(a_position_is_copied_one_off, sizes=CONVERTING),
    Mutation(a_position_is_copied_one_off, "tcp", sizes=CONVERTING),
    Mutation(a_block_is_whole_when_part_of_it_has_come, digests=True, aborts=6, flips=0.1, sizes=CONVERTING),
    Mutation(what_failed_its_proof_is_converted, digests=True, flips=0.02, sizes=CONVERTING),
    Mutation(what_failed_its_proof_is_converted, "tcp", True, flips=0.02, sizes=CONVERTING),
    Mutation(no_generation_check, cuts=0.5, slow=0.8, sizes=CONVERTING),
]


@pytest.mark.parametrize(
    "mutation",
    MUTATIONS,
    ids=lambda m: f"{m.take_out.__name__}-{m.transport}" + "-converting" * (m.sizes != ALIKE),
)
async def test_a_rule_that_is_taken_out_is_noticed(
    monkeypatch: pytest.MonkeyPatch, rough_copies: dict[str, float], mutation: Mutation
) -> None:
    rough_copies |= {"flips": mutation.flips, "slow": mutation.slow, "longest": 0.02}
    mutation.take_out(monkeypatch)
    with pytest.raises(Mixed):
        await hand_over(
            mutation.transport,
            4,
            3000,
            sizes=mutation.sizes,
            digests=mutation.digests,
            cuts=mutation.cuts,
            aborts=mutation.aborts,
        )
