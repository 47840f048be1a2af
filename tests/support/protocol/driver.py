"""Nodes, the copies between them, and what must hold whatever happens, in whatever order.

Owns everything of a model world but time: a subclass decides when a message is delivered, when a
copy ends and what fails (world.py at random, search.py in every order). Copies tear when the source
is rewritten meanwhile, and go on after the source has torn its link down: the hard case, shared
memory, where a reader cannot be stopped.
"""

from __future__ import annotations

import dataclasses

from common.wire.message import HandoffKey, Message
from kv_transfer.handoff import Handoff
from kv_transfer.intake import Intake
from kv_transfer.lease import Leases
from kv_transfer.ports import (
    Adopted,
    Copy,
    Effect,
    Ended,
    Outcome,
    Piece,
    ReadyBlock,
    Send,
    Teardown,
    TransferSettings,
)
from tests.support.protocol.model import BLOCK, FINGERPRINT, RUBBISH, Pool, identities, offer_of, require

FLIPPED = b"flipped".ljust(16)


@dataclasses.dataclass(eq=False)
class Node:
    name: str
    driver: Driver
    pool_size: int
    life: int = 0
    alive: bool = True
    stopped_until: float = 0.0

    def __post_init__(self) -> None:
        self.pool = Pool(self.driver, self.pool_size)
        self.leases = Leases(self.pool)
        self.handoff = Handoff(self.leases, self.driver.settings)
        self.intake = Intake(self.pool, FINGERPRINT, self.driver.settings)
        self.links: dict[Node, str] = {}  # to whom we send, by which link
        self.open: set[str] = set()  # links of either direction this node believes in
        self.room = False


@dataclasses.dataclass(eq=False)
class Prefill:
    """One attempt on the sending node: its sequence, chunk by chunk."""

    request: str
    attempt: int
    token_ids: tuple[int, ...]
    node: Node
    target: Node
    life: int
    key: HandoffKey | None = None
    asks: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)
    missing: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    offer_at: int = 0
    released: bool = False
    over: bool = False
    tries: int = 0


@dataclasses.dataclass(eq=False)
class Running:
    """A copy under way: of whose pool, and what it found there when it began."""

    node: Node
    copy: Copy
    source: Pool
    found: list[tuple[int, bytes]]  # generation and content, by piece


class Driver:
    def __init__(self, settings: TransferSettings, *, digests: bool) -> None:
        self.settings, self.digests = settings, digests
        self.now = 0.0
        self.nodes: list[Node] = []
        self.ends: dict[str, tuple[Node, Node]] = {}  # link → source, target
        self.torn: set[str] = set()  # links that the source has torn down
        self.copies: list[Running] = []
        self.prefills: dict[HandoffKey, Prefill] = {}
        self.outcomes: dict[HandoffKey, Outcome] = {}
        self.adoptions: set[HandoffKey] = set()

    # What a subclass decides

    def post(self, node: Node, message: Message) -> None:
        """A message is on its way to `node`."""
        raise NotImplementedError

    def copy_begun(self, running: Running) -> None:
        raise NotImplementedError

    def decodes(self, node: Node, adopted: Adopted) -> None:
        """The sequence reads its blocks for a while; `decoded` ends it."""
        raise NotImplementedError

    def tear(self, link: str) -> None:
        """Both ends are to learn that the link is down: `notice`."""
        raise NotImplementedError

    def attempt_failed(self, prefill: Prefill) -> None:
        raise NotImplementedError

    def asks_again(self, prefill: Prefill) -> bool:
        """Whether a prompt that was not taken is offered once more, before it is given up."""
        return False

    def arrange(self, pool: Pool, free: list[int]) -> None:
        raise NotImplementedError

    # Effects, messages, links

    def perform(self, node: Node, effects: list[Effect]) -> None:
        for effect in effects:
            kind = type(effect)
            if kind is Send:
                source, target = self.ends[effect.link]
                self.post(target if node is source else source, effect.message)
            elif kind is Copy:
                self.start_copy(node, effect)
            elif kind is Ended:
                if effect.sending:
                    self.handoff_ended(effect)
            elif kind is Adopted:
                self.adopted(node, effect)
            elif kind is Teardown:
                self.tear(effect.link)
        if node.room:
            node.room = False
            self.perform(node, node.intake.room_changed(self.now))

    def deliver(self, node: Node, message: Message) -> None:
        end = node.handoff if self.ends[message.key.link][0] is node else node.intake  # type: ignore[attr-defined]
        self.perform(node, end.receive(message, now=self.now))

    def open_link(self, source: Node, target: Node, link: str) -> None:
        self.ends[link] = (source, target)
        source.links[target] = link
        source.open.add(link)
        target.open.add(link)
        target.intake.open_link(link, self.settings.credits)
        source.handoff.open_link(link, self.settings.credits)

    def notice(self, node: Node, link: str) -> None:
        """One end learns that a link is down."""
        node.open.discard(link)
        source, target = self.ends[link]
        if node is source:
            self.torn.add(link)
            if node.links.get(target) == link:
                del node.links[target]
            self.perform(node, node.handoff.link_lost(link, now=self.now))
        else:
            self.perform(node, node.intake.link_lost(link, now=self.now))

    def tick(self, node: Node) -> None:
        self.perform(node, node.handoff.tick(self.now))
        self.perform(node, node.intake.tick(self.now))

    # Copies

    def start_copy(self, node: Node, copy: Copy) -> None:
        pool = self.ends[copy.key.link][0].pool
        if copy.key.link not in self.torn:
            for piece in copy.pieces:
                require(pool.references[piece.slot], "a copy of a block that is free")
        found = [(pool.generation[p.slot], pool.content[p.slot]) for p in copy.pieces]
        self.copies.append(running := Running(node, copy, pool, found))
        self.copy_begun(running)

    def end_copy(self, running: Running, flips: tuple[bool, ...] = ()) -> None:
        """The bytes are here: what stood still is right, and `flips` says which are corrupted."""
        node, copy, source = running.node, running.copy, running.source
        self.copies.remove(running)
        error = ""
        for number, piece in enumerate(copy.pieces):
            before, content = running.found[number]
            read = content if source.content[piece.slot] == content else RUBBISH
            if flips and flips[number]:
                read = FLIPPED
            node.pool.content[piece.block] = read
            after = source.generation[piece.slot]
            error = error or self.check_piece(piece, before, after, read)
        if error == "stale_block":
            require(copy.key.link in self.torn, "a leased block was reused")
        self.perform(node, node.intake.copied(copy.number, error, now=self.now))

    def check_piece(self, piece: Piece, before: int, after: int, read: bytes) -> str:
        """What the reader of a transport does: generations around the copy, then the digest."""
        if not (before == after == piece.generation and before % 2 == 0):
            return "stale_block"
        if piece.digest and read != piece.digest:
            return "digest_mismatch"
        return ""

    # Watching pools

    def freed(self, pool: Pool, block: int) -> None:
        """A freed block is in no copy of a peer whose link its node has not torn down."""
        for running in self.copies:
            if running.source is pool and running.copy.key.link not in self.torn:
                require(
                    all(piece.slot != block for piece in running.copy.pieces),
                    "freed a block that the peer is reading",
                )

    def room_changed(self, pool: Pool) -> None:
        for node in self.nodes:
            if node.pool is pool:
                node.room = True

    def landing(self, pool: Pool, block: int) -> bool:
        return any(
            piece.block == block
            for running in self.copies
            if running.node.pool is pool
            for piece in running.copy.pieces
        )

    # A prompt on the sending node: the prefill role in miniature

    def offer(self, prefill: Prefill, link: str) -> None:
        """Offer now; say what is computed already."""
        node = prefill.node
        prefill.asks += 1
        prefill.key = HandoffKey(link, prefill.request, prefill.attempt, 0, prefill.asks)
        self.prefills[prefill.key] = prefill
        offer = offer_of(prefill.key, prefill.token_ids)
        self.perform(node, node.handoff.offer(offer, now=self.now))
        self.announce(prefill, 0, prefill.computed)

    def compute(self, prefill: Prefill, end: int) -> None:
        """One chunk: the blocks up to index `end`, announced if they are offered."""
        wanted = identities(prefill.token_ids)
        full = len(prefill.token_ids) // BLOCK
        for index in range(prefill.computed, end):
            if index in prefill.missing:
                prefill.node.pool.seal(prefill.blocks[index], wanted[index], index < full)
        start, prefill.computed = prefill.computed, end
        if prefill.key is not None:
            self.announce(prefill, start, end)

    def announce(self, prefill: Prefill, start: int, end: int) -> None:
        node, pool, key = prefill.node, prefill.node.pool, prefill.key
        assert key is not None
        blocks = [
            ReadyBlock(index, slot, pool.generation[slot], pool.content[slot] if self.digests else b"")
            for index, slot in enumerate(prefill.blocks[start:end], start)
        ]
        if blocks:
            self.perform(node, node.handoff.ready(key, blocks, now=self.now))

    def finish(self, prefill: Prefill) -> None:
        node = prefill.node
        assert prefill.key is not None
        effects = node.handoff.finished(
            prefill.key, position=len(prefill.token_ids), first_token=7, logprobs=None, now=self.now
        )
        self.perform(node, effects)
        self.let_go(prefill)

    def let_go(self, prefill: Prefill) -> None:
        """The prefill sequence is over: its own references go; leases keep theirs."""
        if not prefill.released:
            prefill.released = True
            prefill.node.pool.release(prefill.blocks)
            self.perform(prefill.node, [])

    # Ends

    def handoff_ended(self, ended: Ended) -> None:
        key = ended.key
        require(key not in self.outcomes, "a handoff ended twice")
        self.outcomes[key] = ended.outcome
        prefill = self.prefills[key]
        prefill.over = True
        if ended.outcome is Outcome.ADOPTED:
            require(key in self.adoptions, "acknowledged but not adopted")
            return
        require(
            key not in self.adoptions or ended.outcome is Outcome.LINK_LOST,
            f"adopted there, {ended.outcome.value} here",
        )
        if self.asks_again(prefill):
            prefill.over, prefill.key = False, None
        else:
            self.attempt_failed(prefill)

    def adopted(self, node: Node, adopted: Adopted) -> None:
        require(adopted.key not in self.adoptions, "adopted twice")
        self.adoptions.add(adopted.key)
        node.pool.check(
            adopted.reservation.blocks, adopted.offer.request.token_ids, "an adopted block has wrong content"
        )
        self.decodes(node, adopted)

    def decoded(self, node: Node, adopted: Adopted) -> None:
        blocks = adopted.reservation.blocks
        node.pool.check(blocks, adopted.offer.request.token_ids, "a block changed while decoding")
        node.pool.release(blocks)
        self.perform(node, [])

    def check_quiet(self) -> None:
        """Nothing is under way any more: then nothing may be held either."""
        for node in self.nodes:
            if not node.alive:
                continue
            require(not node.handoff.states(), f"handoffs left: {node.handoff.states()}")
            require(not node.intake.states(), f"intakes left: {node.intake.states()}")
            require(not any(node.leases.count().values()), f"leases left: {node.leases.count()}")
            require(not node.pool.reservations, "reservations left")
            require(not any(node.pool.references), "blocks left in use")
        for key, prefill in self.prefills.items():
            if prefill.node.life == prefill.life and prefill.node.alive:
                require(key in self.outcomes, f"{key} never ended")
