"""Nodes, the copies between them, and what must hold whatever happens, in whatever order.

Owns everything of a model world but time: a subclass decides when a message is delivered, when a
copy ends and what fails (world.py at random, search.py in every order). Copies tear when the source
is rewritten meanwhile, and go on after the source has torn its link down: the hard case, shared
memory, where a reader cannot be stopped.
"""

from __future__ import annotations

import dataclasses

from common.node.departure import State
from common.wire.message import HandoffKey, Message
from kv_transfer.handoff import Handoff
from kv_transfer.intake import Intake
from kv_transfer.lease import Leases
from kv_transfer.ports import (
    Adopted,
    Copy,
    Effect,
    Ended,
    Granted,
    Outcome,
    Piece,
    Send,
    Teardown,
    TransferSettings,
)
from tests.support.protocol.model import BLOCK, FINGERPRINT, RUBBISH, Pool, identities, require
from tests.support.protocol.sending import ModelSender, Work

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
        self.sender = ModelSender(self.driver, self)
        self.links: dict[Node, str] = {}  # to whom we send, by which link
        self.open: set[str] = set()  # links of either direction this node believes in
        self.room = False


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
        self.handoffs: dict[HandoffKey, Work] = {}
        self.works: list[Work] = []
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

    def link_wanted(self, work: Work) -> None:
        """A link to its target is being opened: `ModelSender.opened`."""
        raise NotImplementedError

    def may_act(self, work: Work) -> None:
        """The sending node may do something about it: `act`."""
        raise NotImplementedError

    def waits_for_grant(self, work: Work) -> None:
        """`ModelSender.no_grant` may follow, until its timer is cancelled."""
        raise NotImplementedError

    def work_over(self, work: Work) -> None:
        """It has ended on the sending node."""
        raise NotImplementedError

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
            elif kind is Granted:
                node.sender._heard(self.handoffs[effect.key].departure, effect)
            elif kind is Ended:
                if effect.sending:
                    self.handoff_ended(node, effect)
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

    # A choice on the sending node

    def begin(self, work: Work) -> bool:
        """Give it its blocks, if there is room."""
        wanted = identities(work.prompt)
        full = len(work.prompt) // BLOCK
        taken = work.node.pool.take(wanted, full)
        if taken is None:
            return False
        work.block_table, work.missing = taken
        self.works.append(work)
        if work.moves:
            self.compute(work, len(wanted))
        return True

    def compute(self, work: Work, end: int) -> None:
        """Its blocks up to index `end` hold their KV, and are sealed, but for the tail of a sequence
        that runs."""
        wanted, pool = identities(work.prompt), work.node.pool
        full = len(work.prompt) // BLOCK
        for index in range(work.num_blocks, end):
            if index in work.missing and not (work.moves and index == full):
                pool.seal(work.block_table[index], wanted[index], index < full)
        work.num_blocks = end
        if not work.moves:
            work.node.sender.filled(work.departure, work.num_computed)

    def act(self, work: Work, chunk: int = 1) -> bool:
        """The next thing that the engine or the role of the sending node does about it; False: there is
        none."""
        departure, sender = work.departure, work.node.sender
        state, count = departure.state, len(identities(work.prompt))
        if work.moves:
            if state is State.LINKED:
                sender.pause(departure)
            elif state is not State.HERE:
                return False
            elif not sender.ask(departure):  # it runs to its end here
                self.end(work)
        elif state is State.HERE and work.num_blocks >= work.offer_at and sender.ask(departure):
            pass
        elif departure.is_computing and work.num_blocks < count:
            self.compute(work, min(count, work.num_blocks + chunk))
        elif departure.is_computing:
            sender.computed(departure, None)
        elif state is not State.HELD:
            return False
        elif not sender.ask(departure):
            self.end(work)
        return True

    def end(self, work: Work) -> None:
        """Nobody wants it any more, or it has run to its end."""
        work.node.sender.abort(work)
        work.node.sender.cancel(work.departure, "cancelled")
        self.perform(work.node, [])

    def say_again(self, work: Work) -> None:
        """The engine says late what it has filled, and the client once more that it is gone."""
        if not work.moves:
            work.node.sender.filled(work.departure, work.num_computed)
        if not work.departure.is_wanted:
            self.end(work)

    # Ends

    def handoff_ended(self, node: Node, ended: Ended) -> None:
        key = ended.key
        require(key not in self.outcomes, "a handoff ended twice")
        self.outcomes[key] = ended.outcome
        if ended.outcome is Outcome.ADOPTED:
            require(key in self.adoptions, "acknowledged but not adopted")
        else:
            require(
                key not in self.adoptions or ended.outcome is Outcome.LINK_LOST,
                f"adopted there, {ended.outcome.value} here",
            )
        node.sender._heard(self.handoffs[key].departure, ended)

    def adopted(self, node: Node, adopted: Adopted) -> None:
        require(adopted.key not in self.adoptions, "adopted twice")
        work = self.handoffs[adopted.key]
        runs = work.status == "running" and adopted.key.link not in self.torn
        require(not runs or not work.node.alive, "adopted, while it runs on the sending node")
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
        for work in self.works:
            if work.node.life == work.life and work.node.alive:
                require(work.is_over, f"{work.request} never ended: it is {work.departure.state.value}")
