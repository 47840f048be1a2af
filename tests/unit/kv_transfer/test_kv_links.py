"""The driver: two nodes in one process, real pools and transports, an in-memory bus."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import torch

from common.errors import FingerprintMismatch, LinkLost
from common.kv_layout import Fingerprint, KVLayout, root_hash
from common.wire.message import HandoffKey, Message
from common.wire.messages import Offer
from kv_transfer.digests import tail_seed
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
from kv_transfer.transports.base import Source, Target
from kv_transfer.transports.shm import ShmReader, ShmSource
from kv_transfer.transports.tcp import TcpReader, TcpSource
from tests.support.asked import a_request
from tests.support.hashes import chain_hashes
from tests.support.redis import HANGS_S

LAYOUT = KVLayout.paged_attention(num_layers=2, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")

FINGERPRINT = Fingerprint("model", "rev", LAYOUT.describe(), "numerics", 4)
OPENERS = {"shm": ShmReader.open, "tcp": TcpReader.open}
SETTINGS = TransferSettings(repeat=0.05, answer=5.0, patience=0.3, quiet=0.5, copy_blocks=3)
BLOCKS = 16


class Wires:
    """An in-memory bus for all nodes: messages arrive in order, until a connection is cut."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.cuts: set[str] = set()

    def connection(self, a: str, b: str) -> str:
        return "-".join(sorted((a, b)))

    def cut(self, a: str, b: str) -> None:
        name = self.connection(a, b)
        if name not in self.cuts:
            self.cuts.add(name)
            for node in (a, b):
                loop = asyncio.get_running_loop()
                loop.call_soon(self.nodes[node].links.connection_lost, name)


class Port:
    """One node's end of the wires."""

    def __init__(self, wires: Wires, name: str) -> None:
        self.wires, self.name = wires, name

    def send(self, peer: str, message: Message, *, link: str | None = None) -> None:
        connection = self.wires.connection(self.name, peer)
        if connection in self.wires.cuts:
            raise LinkLost("cut")
        asyncio.get_running_loop().call_soon(
            self.wires.nodes[peer].links.receive, self.name, connection, message
        )

    def link(self, peer: str) -> str | None:
        connection = self.wires.connection(self.name, peer)
        return None if connection in self.wires.cuts else connection

    def disconnect(self, peer: str) -> None:
        self.wires.cut(self.name, peer)


class Pool:
    """References and a prefix cache over real memory; enough for both roles."""

    def __init__(self, memory: PoolMemory, block_size: int) -> None:
        self.memory, self.block_size = memory, block_size
        self.references = [0] * memory.num_blocks
        self.cached: dict[bytes, int] = {}

    def acquire(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] -= 1

    def allocate(self, count: int) -> list[int] | None:
        cached = set(self.cached.values())
        free = [b for b, n in enumerate(self.references) if n == 0 and b not in cached]
        if len(free) < count:
            return None
        for block in free[:count]:
            self.memory.begin_write(block)
        self.acquire(free[:count])
        return free[:count]

    def reserve(self, offer: Offer) -> Reservation | None:
        held = [self.cached[h] for h in offer.block_hashes if h in self.cached]
        count = -(-len(offer.request.token_ids) // self.block_size) - len(held)
        new = self.allocate(count)
        if new is None:
            return None
        self.acquire(held)
        return Reservation((*held, *new), tuple(range(len(held), len(held) + count)))

    def withdraw(self, offer: Offer) -> None: ...

    def landed(self, reservation: Reservation, piece: Piece) -> None:
        self.memory.seal(piece.block)
        self.memory.digests[piece.block] = piece.digest
        if not piece.fill:
            self.cached[piece.seed] = piece.block

    def adopt(self, reservation: Reservation) -> None: ...

    def discard(self, reservation: Reservation) -> None:
        self.release(reservation.blocks)


class Node:
    def __init__(
        self,
        wires: Wires,
        name: str,
        transport: str,
        fingerprint: Fingerprint = FINGERPRINT,
        settings: TransferSettings = SETTINGS,
    ) -> None:
        self.layout = LAYOUT.with_block_size(fingerprint.block_size)
        if fingerprint.draft:
            self.layout = self.layout.with_draft(LAYOUT.with_block_size(fingerprint.block_size))
        self.memory = HostPoolMemory(BLOCKS, self.layout.slab_bytes)
        self.pool = Pool(self.memory, fingerprint.block_size)
        self.leases = Leases(self.pool)
        self.sent: list[Granted | Ended] = []
        self.received: list[Adopted | Ended] = []
        self.happened = asyncio.Event()
        sources: list[Source] = []
        if transport != "tcp":
            sources.append(ShmSource(self.memory))
        if transport != "shm":
            sources.append(TcpSource(self.memory, self.layout, self.leases))
        self.links = Links(
            Port(wires, name),
            name,
            fingerprint,
            Target(self.memory, self.layout),
            pool=self.pool,
            leases=self.leases,
            make_transports=lambda: (sources, {source.name: OPENERS[source.name] for source in sources}),
            on_arrival=self.hear(self.received),
            on_intake_ended=self.hear(self.received),
            settings=settings,
        )
        wires.nodes[name] = self
        self.links.start()

    def hear(self, where: list) -> Callable[[object], None]:
        def on(event: object) -> None:
            where.append(event)
            self.happened.set()

        return on

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(HANGS_S):
            while not condition():
                self.happened.clear()
                await self.happened.wait()

    async def until_settled(self) -> None:
        """Nothing is being opened or closed."""
        async with asyncio.timeout(HANGS_S):
            while self.links._ends._tasks:
                await asyncio.wait(self.links._ends._tasks)

    async def quiet(self) -> None:
        """No lease, no reservation: what ends them runs on the loop, so turns of it do."""
        async with asyncio.timeout(HANGS_S):
            while any(self.leases.count().values()) or self.links.intakes():  # noqa: ASYNC110
                await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def two_nodes(
    transport: str, there: Fingerprint = FINGERPRINT, here: Fingerprint = FINGERPRINT
) -> AsyncIterator[tuple[Wires, Node, Node]]:
    """`tcp to 6` is a link over tcp to a node with blocks of 6 positions."""
    transport, _, size = transport.partition(" to ")
    if size:
        there = dataclasses.replace(there, block_size=int(size))
    wires = Wires()
    nodes = Node(wires, "p", transport, here), Node(wires, "d", transport, there)
    try:
        yield wires, *nodes
    finally:
        for node in nodes:
            await node.links.close()
            assert not any(node.leases.count().values())
            node.memory.close()


class Prompt:
    """A prompt on the prefill node: blocks filled with random bytes, as prefill would."""

    def __init__(self, node: Node, name: str, length: int) -> None:
        self.node, self.tokens = node, tuple(range(length))
        self.hashes = chain_hashes(root_hash(FINGERPRINT), self.tokens, 4, length)
        self.fill = length % 4
        self.count = len(self.hashes) + (self.fill > 0)
        blocks = node.pool.allocate(self.count)
        assert blocks is not None
        self.blocks, self.name = blocks, name

    def offer(self, link: str, attempt: int = 1, ask: int = 1) -> HandoffKey:
        key = HandoffKey(link, self.name, attempt, 0, ask)
        offer = Offer(key, a_request(self.tokens, name=self.name), tuple(self.hashes), self.fill, 0)
        self.node.links.offer(offer, self.node.hear(self.node.sent))
        return key

    def compute(self, key: HandoffKey, start: int, end: int) -> None:
        memory, ready = self.node.memory, []
        for index in range(start, end):
            block = self.blocks[index]
            memory.slabs[block] = torch.randint(0, 256, (memory.slab_bytes,)).to(torch.uint8)
            if index < len(self.hashes):
                own = self.node.layout.without_draft.ranges()
                generation = memory.seal(block, self.hashes[index], own)
            else:
                parent = self.hashes[-1] if self.hashes else root_hash(FINGERPRINT)
                seed = tail_seed(parent, self.tokens[-self.fill :])
                generation = memory.seal(block, seed, LAYOUT.ranges(self.fill))
            ready.append(ReadyBlock(index, block, generation, memory.digests[block]))
        self.node.links.announce(key, ready)

    def finish(self, key: HandoffKey) -> None:
        end = len(self.tokens)
        self.node.links.commit(key, position=end, first_token=9, logprobs=None, draft_positions=end)
        self.node.pool.release(self.blocks)

    def arrived(self, adopted: Adopted, there: Node) -> bool:
        return all(
            torch.equal(
                at_position(self.node, self.blocks, position),
                at_position(there, adopted.reservation.blocks, position),
            )
            for position in range(len(self.tokens))
        )


def at_position(node: Node, blocks: Sequence[int], position: int) -> torch.Tensor:
    """The KV of one position of a sequence, all segments of the model's own."""
    index, at = divmod(position, node.layout.block_size)
    own = node.layout.without_draft
    slab = node.memory.slabs[blocks[index]][: own.slab_bytes]
    segments = slab.view(len(own.segments), own.block_size, -1)
    return segments[:, at]


async def handed_over(prompt: Prompt, here: Node, there: Node) -> Adopted:
    """The first prompt of a link, all of it at once, as it arrived."""
    key = prompt.offer(await here.links.open("d"))
    prompt.compute(key, 0, prompt.count)
    prompt.finish(key)
    await there.until(lambda: there.received)
    adopted = there.received[0]
    assert isinstance(adopted, Adopted)
    assert prompt.arrived(adopted, there)
    return adopted


every_transport = pytest.mark.parametrize("transport", ["shm", "tcp"])
every_link = pytest.mark.parametrize("transport", ["shm", "tcp", "shm to 3", "tcp to 6"])


@every_link
async def test_a_prompt_is_handed_over_chunk_by_chunk(transport: str) -> None:
    async with two_nodes(transport) as (_, p, d):
        link = await p.links.open("d")
        assert p.links.describe()[0]["transport"] == transport.partition(" ")[0]
        prompt = Prompt(p, "r", 30)
        key = prompt.offer(link)
        prompt.compute(key, 0, 3)
        await p.until(lambda: p.sent)
        prompt.compute(key, 3, 6)
        prompt.compute(key, 6, 8)
        prompt.finish(key)
        await d.until(lambda: d.received)
        assert isinstance(adopted := d.received[0], Adopted)
        assert (adopted.commit.first_token, adopted.commit.position) == (9, 30)
        assert 0.0 <= adopted.waited < 10.0
        assert prompt.arrived(adopted, d)
        await p.until(lambda: p.sent[-1] == Ended(key, True, Outcome.ADOPTED, ""))
        await p.quiet()
        assert set(p.pool.references) == {0}


@every_link
@pytest.mark.parametrize("length", [1, 3, 4, 5])
async def test_prompts_around_the_length_of_a_block_arrive(transport: str, length: int) -> None:
    async with two_nodes(transport) as (_, p, d):
        await handed_over(Prompt(p, "r", length), p, d)


@every_link
@pytest.mark.parametrize(
    "drafts", [("", "small@1"), ("small@1", ""), ("small@1", "small@2"), ("small@1",) * 2]
)
async def test_a_draft_models_kv_comes_along_where_both_ends_have_the_same(
    transport: str, drafts: tuple[str, str]
) -> None:
    here, there = (dataclasses.replace(FINGERPRINT, draft=draft) for draft in drafts)
    async with two_nodes(transport, there, here) as (_, p, d):
        adopted = await handed_over(Prompt(p, "r", 10), p, d)
        same = drafts[0] == drafts[1]
        assert adopted.commit.draft_positions == (10 if same else 0)
        [received] = d.links.received_bytes.values()
        assert received == 10 * (d.layout if same else d.layout.without_draft).bytes_per_token
        assert ("draft model's KV is not sent" in d.links.describe()[0]["reason"]) is not same


@every_transport
async def test_blocks_the_decode_side_holds_are_not_sent(transport: str) -> None:
    async with two_nodes(transport) as (_, p, d):
        link = await p.links.open("d")
        first, second = Prompt(p, "first", 10), Prompt(p, "second", 14)  # two blocks in common
        for prompt in (first, second):
            key = prompt.offer(link)
            prompt.compute(key, 0, prompt.count)
            prompt.finish(key)
            done = Ended(key, True, Outcome.ADOPTED, "")
            await p.until(lambda done=done: done in p.sent)
        granted = [event for event in p.sent if isinstance(event, Granted)]
        assert [event.missing for event in granted] == [(0, 1, 2), (2, 3)]
        name = d.links.describe()[0]["transport"]
        assert d.links.received_blocks == {name: 5}
        assert d.links.received_bytes == {name: 4 * LAYOUT.slab_bytes}  # two tails are half full
        assert p.links.ended == {("handoff", name, "adopted"): 2}
        assert d.links.ended == {("intake", name, "adopted"): 2}


@every_link
async def test_a_corrupted_block_fails_the_attempt_and_the_next_one_succeeds(transport: str) -> None:
    async with two_nodes(transport) as (_, p, d):
        link = await p.links.open("d")
        prompt = Prompt(p, "r", 12)
        key = prompt.offer(link)
        prompt.compute(key, 0, 1)
        await p.until(lambda: p.sent)
        p.memory.slabs[prompt.blocks[0]][3] ^= 1
        prompt.compute(key, 1, 3)
        p.memory.slabs[prompt.blocks[2]][3] ^= 1
        prompt.finish(key)
        await p.until(lambda: len(p.sent) == 2)
        assert p.sent[1] == Ended(key, True, Outcome.FAILED, "digest_mismatch")
        await d.quiet()
        again = Prompt(p, "r", 12)
        key = again.offer(link, attempt=2)
        again.compute(key, 0, 3)
        again.finish(key)
        await p.until(lambda: p.sent[-1] == Ended(key, True, Outcome.ADOPTED, ""))


@every_transport
async def test_a_prompt_for_which_there_is_no_room_is_denied_after_the_patience(transport: str) -> None:
    async with two_nodes(transport) as (_, p, d):
        link = await p.links.open("d")
        assert d.pool.allocate(BLOCKS - 2) is not None
        prompt = Prompt(p, "r", 12)
        key = prompt.offer(link)
        await p.until(lambda: p.sent)
        assert p.sent == [Ended(key, True, Outcome.DENIED, "out_of_blocks")]


@every_link
async def test_a_prompt_that_was_denied_is_taken_on_the_same_link_when_room_has_come(transport: str) -> None:
    async with two_nodes(transport) as (_, p, d):
        link = await p.links.open("d")
        held = d.pool.allocate(BLOCKS - 2)
        assert held is not None
        prompt = Prompt(p, "r", 24)
        denied = prompt.offer(link)
        await p.until(lambda: p.sent)
        assert p.sent == [Ended(denied, True, Outcome.DENIED, "out_of_blocks")]
        d.pool.release(held)
        again = prompt.offer(await p.links.open("d"), ask=2)
        assert again.link == denied.link
        prompt.compute(again, 0, prompt.count)
        prompt.finish(again)
        await d.until(lambda: isinstance(d.received[-1], Adopted))
        assert isinstance(adopted := d.received[-1], Adopted)
        assert prompt.arrived(adopted, d)
        await p.until(lambda: p.sent[-1] == Ended(again, True, Outcome.ADOPTED, ""))
        await p.quiet()


@every_link
async def test_a_cut_connection_ends_leases_and_reservations_at_both_ends(transport: str) -> None:
    async with two_nodes(transport) as (wires, p, d):
        link = await p.links.open("d")
        prompt = Prompt(p, "r", 30)
        key = prompt.offer(link)
        prompt.compute(key, 0, 6)
        await p.until(lambda: p.sent)
        wires.cut("p", "d")
        await p.until(lambda: Ended(key, True, Outcome.LINK_LOST, "link_lost") in p.sent)
        await d.until(lambda: Ended(key, False, Outcome.LINK_LOST, "link_lost") in d.received)
        await p.quiet()
        await d.quiet()
        assert set(d.pool.references) == {0}
        assert not p.links.describe()
        with pytest.raises(LinkLost):
            await p.links.open("d")


@every_transport
async def test_a_reader_that_has_lost_its_source_ends_the_link(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bus still has the peer: without this every later handoff would fail on the same link."""

    def lost(_: object, pieces: object) -> None:
        raise LinkLost("its socket is gone")

    async with two_nodes(transport) as (_, p, d):
        link = await p.links.open("d")
        monkeypatch.setattr(type(d.links._ends._ends[link].reader), "pull", lost)
        prompt = Prompt(p, "r", 30)
        prompt.compute(prompt.offer(link), 0, 6)
        async with asyncio.timeout(HANGS_S):
            while d.links.describe() or p.links.describe():  # noqa: ASYNC110 (nobody says so)
                await asyncio.sleep(0.01)
        await p.quiet()
        await d.quiet()
        assert set(d.pool.references) == {0}


@every_link
async def test_a_cancelled_handoff_frees_both_ends(transport: str) -> None:
    async with two_nodes(transport) as (_, p, d):
        link = await p.links.open("d")
        prompt = Prompt(p, "r", 30)
        key = prompt.offer(link)
        prompt.compute(key, 0, 4)
        await p.until(lambda: p.sent)
        p.links.cancel(key, "cancelled")
        await p.until(lambda: p.sent[-1] == Ended(key, True, Outcome.CANCELLED, "cancelled"))
        await d.quiet()
        await p.quiet()
        assert set(d.pool.references) == {0}


def another_layout(**fields: object) -> str:
    same = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "block_size": 4, "dtype": "float32"}
    return KVLayout.paged_attention(**(same | fields)).describe()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "value", "field", "there", "here"),
    [
        ("model", "other", "model", "other", "model"),
        ("revision", "x", "revision", "x", "rev"),
        ("layout", another_layout(dtype="bfloat16"), "dtype", "bfloat16", "float32"),
        ("layout", another_layout(num_layers=3), "num_layers", "3", "2"),
        ("layout", another_layout(num_kv_heads=1), "num_kv_heads", "1", "2"),
        ("layout", another_layout(head_dim=16), "head_dim", "16", "8"),
        ("layout", another_layout(dtype="float8_e4m3fn"), "dtype", "float8_e4m3fn", "float32"),
        ("layout", another_layout().replace("0-2 of", "2-4 of"), "head_range", "2-4", "0-2"),
        ("layout", "5f0c" * 8, "layout", "5f0c" * 8, LAYOUT.describe()),
        ("numerics", "x", "numerics", "x", "numerics"),
        ("adapter", "x", "adapter", "x", ""),
    ],
)
async def test_a_node_that_serves_something_else_is_refused_by_name(
    changed: str, value: str, field: str, there: str, here: str
) -> None:
    other = dataclasses.replace(FINGERPRINT, **{changed: value})  # type: ignore[arg-type]
    async with two_nodes("", other) as (_, p, d):
        with pytest.raises(FingerprintMismatch) as caught:
            await p.links.open("d")
        assert caught.value.param == field
        assert f"{field} is {there!r} there and {here!r} here" in str(caught.value)
        assert not p.links.describe()
        assert not [link for link in d.links.describe() if link["transport"]]


@every_transport
async def test_a_node_with_another_block_size_converts_and_says_so(transport: str) -> None:
    there = dataclasses.replace(FINGERPRINT, block_size=6)
    async with two_nodes(transport, there) as (_, p, d):
        link = await p.links.open("d")
        for node in (p, d):
            (row,) = node.links.describe()
            assert row["transport"] == transport
            assert row["reason"].endswith(
                "blocks of 4 positions are converted to 6, delta is off: every block is sent"
            )
        first, second = Prompt(p, "first", 10), Prompt(p, "second", 14)  # two blocks in common
        for prompt in (first, second):
            key = prompt.offer(link)
            prompt.compute(key, 0, prompt.count)
            prompt.finish(key)
            done = Ended(key, True, Outcome.ADOPTED, "")
            await p.until(lambda done=done: done in p.sent)
            adopted = d.received[-1]
            assert isinstance(adopted, Adopted)
            assert len(adopted.reservation.blocks) == -(-len(prompt.tokens) // 6)
            assert prompt.arrived(adopted, d)
        granted = [event for event in p.sent if isinstance(event, Granted)]
        assert [event.missing for event in granted] == [(0, 1, 2), (0, 1, 2, 3)]
        assert set(d.pool.cached) >= set(chain_hashes(root_hash(there), second.tokens, 6, 14))
        await p.quiet()


@pytest.mark.parametrize("block_size", [0, -1, 10**6])
async def test_a_block_size_that_is_no_such_thing_is_refused(block_size: int) -> None:
    """By whoever would have to make scratch memory of that size."""
    async with two_nodes("shm") as (_, p, _d):
        p.links._ends._fingerprint = dataclasses.replace(FINGERPRINT, block_size=block_size)
        with pytest.raises(FingerprintMismatch) as caught:
            await p.links.open("d")
        assert caught.value.param == "block_size"


async def test_slabs_of_a_size_that_does_not_follow_from_the_layout_are_refused() -> None:
    there = dataclasses.replace(FINGERPRINT, block_size=6)
    async with two_nodes("shm", there) as (_, p, _d):
        p.links._ends._fingerprint = dataclasses.replace(FINGERPRINT, block_size=5)
        with pytest.raises(FingerprintMismatch) as caught:
            await p.links.open("d")
        assert caught.value.param == "slab_bytes"


async def test_the_fastest_transport_that_can_be_proven_is_chosen() -> None:
    async with two_nodes("") as (_, p, d):
        await p.links.open("d")
        assert p.links.describe()[0]["transport"] == "shm"
        assert d.links.describe()[0]["direction"] == "receives"


async def test_without_a_proof_of_one_host_tcp_is_chosen_and_the_reason_said() -> None:
    async with two_nodes("") as (_, p, _d):
        source = p.links._ends._sources[0]
        source._name = b"0" * 16  # type: ignore[attr-defined]  # nobody listens there
        await p.links.open("d")
        row = p.links.describe()[0]
        assert row["transport"] == "tcp"
        assert row["reason"].startswith("shm: not on this host")
