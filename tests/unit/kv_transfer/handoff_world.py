"""A seeded virtual network, clock and set of nodes that drive both ends of the handoff protocol.

A block's content is its identity (hash of its token chain, or the tail's), so that every copy and
every adopted sequence can be checked against its token ids. Copies take time, tear when the source
is rewritten meanwhile, and go on after the source has torn its link down: the hard case, shared
memory, where a reader cannot be stopped.

What must hold is checked where it happens (`Violation`) and at quiescence (`check_quiet`).
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import random

from common.kv_layout import Fingerprint, chain_hashes, root_hash
from common.messages import Offer
from common.sampling import SamplingParams
from kv_transfer.digests import tail_seed
from kv_transfer.handoff import Handoff
from kv_transfer.intake import Intake
from kv_transfer.lease import Leases
from kv_transfer.ports import (
    Adopted,
    Copy,
    Ended,
    Key,
    Outcome,
    Piece,
    ReadyBlock,
    Reservation,
    Send,
    Teardown,
    TransferSettings,
)

BLOCK = 2
FINGERPRINT = Fingerprint("model", "rev", "layout", "numerics", BLOCK)
ROOT = root_hash(FINGERPRINT)
PARAMS = SamplingParams()
SETTINGS = TransferSettings(
    credits=3, repeat=1.0, answer=12.0, patience=4.0, quiet=3.0, remembered=64, copy_blocks=2
)
RUBBISH = b"rubbish".ljust(16)
GIVE_UP = 400.0  # virtual seconds after which a world that still has work is stuck


class Violation(AssertionError):
    """Something that must always hold did not."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Violation(what)


@functools.cache
def identities(token_ids: tuple[int, ...], prompt_len: int) -> tuple[bytes, ...]:
    """What the blocks of a sequence must contain; the tail last."""
    hashes = chain_hashes(ROOT, token_ids, BLOCK, prompt_len)
    if fill := len(token_ids) % BLOCK:
        hashes.append(tail_seed(hashes[-1] if hashes else ROOT, token_ids[-fill:]))
    return tuple(hashes)


@functools.cache
def offer_of(link: str, request: str, attempt: int, token_ids: tuple[int, ...]) -> Offer:
    count, fill = divmod(len(token_ids), BLOCK)
    hashes = identities(token_ids, len(token_ids))[:count]
    return Offer(
        link, request, attempt, 0, token_ids, len(token_ids), PARAMS, hashes, fill, "gateway", "",
        "", 0, 0,
    )  # fmt: skip


class ModelPool:
    """A block pool whose blocks hold one value each. Cached blocks are kept until overwritten."""

    def __init__(self, world: World, node: Node, size: int) -> None:
        self.world, self.node, self.size = world, node, size
        self.content: list[bytes] = [RUBBISH] * size
        self.generation = [0] * size
        self.references = [0] * size
        self.identity: list[bytes] = [b""] * size  # what it is cached as
        self.cached: dict[bytes, int] = {}
        self.reservations: set[int] = set()

    def free(self) -> int:
        return self.references.count(0)

    def take(self, wanted: tuple[bytes, ...], full: int) -> tuple[list[int], list[int]] | None:
        """(blocks, missing indexes) for identities, of which the first `full` may be cached."""
        found: list[int | None] = [self.cached.get(i) for i in wanted[:full]]
        found += [None] * (len(wanted) - full)
        if None in found:
            cut = found.index(None)
            found[cut:] = [None] * (len(found) - cut)
        held = {block for block in found if block is not None}
        free = [b for b in range(self.size) if not self.references[b] and b not in held]
        missing = [i for i, block in enumerate(found) if block is None]
        if len(missing) > len(free):
            return None
        self.world.rng.shuffle(free)
        blocks = [block if block is not None else free.pop() for block in found]
        for i, block in enumerate(blocks):
            self.references[block] += 1
            if found[i] is None:  # begin to write
                if self.identity[block]:
                    del self.cached[self.identity[block]]
                    self.identity[block] = b""
                self.generation[block] += 1 + self.generation[block] % 2  # odd, and new
                self.content[block] = RUBBISH
        return blocks, missing

    def seal(self, block: int, identity: bytes, full: bool) -> None:
        self.content[block] = identity
        self.generation[block] += 1
        if full:
            self.publish(block, identity)

    def publish(self, block: int, identity: bytes) -> None:
        if identity not in self.cached:
            self.cached[identity] = block
            self.identity[block] = identity

    # BlockReferences

    def acquire(self, blocks: list[int]) -> None:
        for block in blocks:
            require(self.references[block] > 0, "acquired a block that nobody holds")
            self.references[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] -= 1
            require(self.references[block] >= 0, "released a block too often")
            if not self.references[block]:
                self.world.check_untouched(self.node, block)
        self.world.room_changed(self.node)

    # IntakePool

    def reserve(self, offer: Offer) -> Reservation | None:
        wanted = identities(offer.token_ids, offer.prompt_len)
        taken = self.take(wanted, len(offer.block_hashes))
        if taken is None:
            return None
        reservation = Reservation(tuple(taken[0]), tuple(taken[1]))
        self.reservations.add(id(reservation))
        self.world.reserved[id(reservation)] = reservation
        return reservation

    def landed(self, reservation: Reservation, piece: Piece) -> None:
        require(id(reservation) in self.reservations, "landed in a reservation that is over")
        self.generation[piece.block] += 1
        if not piece.fill:
            require(self.content[piece.block] == piece.seed, "a wrong block was published")
            self.publish(piece.block, piece.seed)

    def adopt(self, reservation: Reservation) -> None:
        require(id(reservation) in self.reservations, "adopted what was not reserved")
        self.reservations.remove(id(reservation))

    def discard(self, reservation: Reservation) -> None:
        require(id(reservation) in self.reservations, "discarded what was not reserved")
        self.reservations.remove(id(reservation))
        for index in reservation.missing:
            block = reservation.blocks[index]
            require(
                self.references[block] > 1 or block not in self.world.landing(self.node),
                "freed a block into which a copy still runs",
            )
        self.release(list(reservation.blocks))


@dataclasses.dataclass(eq=False)
class Node:
    name: str
    world: World
    pool_size: int
    life: int = 0
    alive: bool = True
    stopped_until: float = 0.0

    def __post_init__(self) -> None:
        self.pool = ModelPool(self.world, self, self.pool_size)
        self.leases = Leases(self.pool)
        self.handoff = Handoff(self.leases, self.world.settings)
        self.intake = Intake(self.pool, FINGERPRINT, self.world.settings)
        self.links: dict[Node, str] = {}  # to whom we send, by which link
        self.open: set[str] = set()  # links of either direction this node believes in
        self.room = False


@dataclasses.dataclass(eq=False)
class Request:
    name: str
    token_ids: tuple[int, ...]
    attempt: int = 0
    retried: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(eq=False)
class Prefill:
    """One attempt on the sending node: its sequence, chunk by chunk."""

    request: Request
    attempt: int
    node: Node
    target: Node
    life: int
    key: Key | None = None
    blocks: list[int] = dataclasses.field(default_factory=list)
    missing: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    offer_at: int = 0
    released: bool = False
    over: bool = False
    tries: int = 0


@dataclasses.dataclass(frozen=True)
class Faults:
    """Probabilities, per message or per schedule. All 0: a network that only delays and reorders."""

    loss: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    tear: float = 0.0
    death: float = 0.0
    stop: float = 0.0
    cancel: float = 0.0


class World:
    """Nodes, requests, links and a heap of what happens next."""

    def __init__(
        self, seed: int, faults: Faults, *, nodes: int = 3, requests: int = 3, pool: int = 5,
        longest: int = 7, attempts: int = 3, both_ways: bool = True, digests: bool = True,
        settings: TransferSettings = SETTINGS,
    ) -> None:  # fmt: skip
        self.rng = random.Random(seed)
        self.digests, self.settings = digests, settings
        self.faults = faults
        self.now = 0.0
        self.heap: list[tuple[float, int, str, object, object]] = []
        self.count = 0
        self.link_count = 0
        self.reserved: dict[int, Reservation] = {}
        self.copies: dict[tuple[str, int], tuple[Node, Copy, list]] = {}
        self.ends: dict[str, tuple[Node, Node]] = {}  # link → source, target
        self.torn: set[str] = set()  # links the source has torn down
        self.prefills: dict[Key, Prefill] = {}
        self.outcomes: dict[Key, Outcome] = {}
        self.adoptions: set[Key] = set()
        self.attempts = attempts
        self.ticking = False
        self.steps = 0
        rng = self.rng
        self.nodes = [Node(f"n{i}", self, pool) for i in range(nodes)]
        half = max(1, nodes // 2)
        self.sources = self.nodes if both_ways else self.nodes[:half]
        self.targets = self.nodes if both_ways else self.nodes[half:]
        self.requests = []
        for i in range(requests):
            shared = rng.randrange(0, longest)
            tokens = tuple(range(shared)) + tuple(
                100 * rng.randrange(3) + j
                for j in range(shared, rng.randrange(shared, longest) + 1)
            )
            self.requests.append(Request(f"r{i}", tokens or (1,)))
            self.at(rng.random() * 3, "start", self.requests[-1])
        if rng.random() < faults.tear:
            for _ in range(rng.randrange(1, 3)):
                self.at(rng.random() * 8, "tear_some")
        if rng.random() < faults.death:
            self.at(rng.random() * 8, "die", rng.choice(self.nodes))
        if rng.random() < faults.stop:
            self.at(rng.random() * 8, "stop", rng.choice(self.nodes))
        if rng.random() < faults.cancel:
            self.at(rng.random() * 8, "cancel_some")

    # Time

    def at(self, delay: float, kind: str, a: object = None, b: object = None) -> None:
        self.count += 1
        heapq.heappush(self.heap, (self.now + delay, self.count, kind, a, b))

    def run(self) -> World:
        heap = self.heap
        self.wake_clock()
        while heap:
            self.now, _, kind, a, b = heapq.heappop(heap)
            self.steps += 1
            require(self.now < GIVE_UP, "stuck: something never ends")
            getattr(self, "on_" + kind)(a, b)
        self.check_quiet()
        return self

    def wake_clock(self) -> None:
        if not self.ticking:
            self.ticking = True
            self.at(0.7, "tick")

    def on_tick(self, _a: object, _b: object) -> None:
        self.ticking = False
        for node in self.nodes:
            if node.alive and node.stopped_until <= self.now:
                self.perform(node, node.handoff.tick(self.now))
                self.perform(node, node.intake.tick(self.now))
        if any(node.handoff.states() or node.intake.states() for node in self.nodes if node.alive):
            self.wake_clock()

    # Faults

    def on_die(self, node: Node, _: object) -> None:
        """The node and all it knew is gone; peers notice later; a new life begins after that."""
        if not node.alive:
            return
        node.alive = False
        for prefill in self.prefills.values():
            if prefill.node is node:
                prefill.over = True
        for link in [link for link, ends in self.ends.items() if node in ends]:
            source, target = self.ends[link]
            peer = target if source is node else source
            if source is node:
                self.torn.add(link)
            self.at(0.5 + self.rng.random() * 3, "notice", peer, link)
        self.at(5, "revive", node)

    def on_revive(self, node: Node, _: object) -> None:
        life, links = node.life + 1, node.links
        node.__post_init__()
        node.life, node.alive = life, True
        del links
        for request in self.requests:  # the gateway retries what was on it
            if request.attempt and self.is_lost(request):
                self.retry(request, request.attempt)

    def is_lost(self, request: Request) -> bool:
        return not any(
            p.request is request and p.attempt == request.attempt and not p.over
            for p in self.prefills.values()
        )

    def on_stop(self, node: Node, _: object) -> None:
        node.stopped_until = self.now + self.rng.random() * 20

    def on_tear_some(self, _a: object, _b: object) -> None:
        links = [link for link, (s, _) in self.ends.items() if link in s.open]
        if links:
            self.tear(self.rng.choice(links))

    def tear(self, link: str) -> None:
        for node in self.ends[link]:
            self.at(self.rng.random() * 2, "notice", node, link)

    def on_notice(self, node: Node, link: str) -> None:
        if not node.alive or link not in node.open:
            return
        if node.stopped_until > self.now:
            self.at(node.stopped_until - self.now + 0.01, "notice", node, link)
            return
        node.open.discard(link)
        source, target = self.ends[link]
        if node is source:
            self.torn.add(link)
            if node.links.get(target) == link:
                del node.links[target]
            self.perform(node, node.handoff.link_lost(link, now=self.now))
        else:
            self.perform(node, node.intake.link_lost(link, now=self.now))

    def on_cancel_some(self, _a: object, _b: object) -> None:
        if self.prefills:
            key = self.rng.choice(list(self.prefills))
            source, target = self.ends[key.link]
            if self.rng.random() < 0.5:
                if source.alive:
                    self.perform(source, source.handoff.cancel(key, "cancelled", now=self.now))
            elif target.alive:
                self.perform(target, target.intake.cancel(key, "cancelled", now=self.now))

    # The network

    def perform(self, node: Node, effects: list) -> None:
        for effect in effects:
            kind = type(effect)
            if kind is Send:
                self.send(node, effect)
            elif kind is Copy:
                self.start_copy(node, effect)
            elif kind is Ended:
                if effect.key in self.prefills and self.ends[effect.key.link][0] is node:
                    self.handoff_ended(node, effect)
            elif kind is Adopted:
                self.adopted(node, effect)
            elif kind is Teardown:
                self.tear(effect.link)
        if node.room:
            node.room = False
            self.perform(node, node.intake.room_changed(self.now))

    def send(self, node: Node, effect: Send) -> None:
        self.wake_clock()
        source, target = self.ends[effect.link]
        peer = target if node is source else source
        rng, faults = self.rng, self.faults
        if faults.loss and rng.random() < faults.loss:
            return
        self.at(0.01 + rng.random() * 0.4, "deliver", (peer, peer.life), effect.message)
        if faults.duplicate and rng.random() < faults.duplicate:
            self.at(rng.random() * 4, "deliver", (peer, peer.life), effect.message)

    def on_deliver(self, where: tuple[Node, int], message: object) -> None:
        node, life = where
        if not node.alive or node.life != life:
            return
        if node.stopped_until > self.now:
            self.at(
                node.stopped_until - self.now + self.rng.random() / 100, "deliver", where, message
            )
            return
        end = node.handoff if self.ends[message.link][0] is node else node.intake
        self.perform(node, end.receive(message, now=self.now))

    # Copies

    def start_copy(self, node: Node, copy: Copy) -> None:
        source = self.ends[copy.key.link][0]
        first = [
            (source.pool, source.pool.generation[p.slot], source.pool.content[p.slot])
            for p in copy.pieces
        ]
        self.copies[(node.name, copy.number)] = (node, copy, first)
        self.at(self.rng.random(), "copied", (node, node.life), copy)

    def on_copied(self, where: tuple[Node, int], copy: Copy) -> None:
        node, life = where
        if node.life != life or not node.alive:
            self.copies.pop((node.name, copy.number), None)
            return
        if node.stopped_until > self.now:
            self.at(node.stopped_until - self.now + 0.01, "copied", where, copy)
            return
        _, _, first = self.copies.pop((node.name, copy.number))
        error = ""
        for piece, (pool, generation, content) in zip(copy.pieces, first, strict=True):
            read = content if pool.content[piece.slot] == content else RUBBISH
            if self.faults.corrupt and self.rng.random() < self.faults.corrupt:
                read = b"flipped".ljust(16)
            node.pool.content[piece.block] = read
            error = error or self.check_piece(piece, generation, pool.generation[piece.slot], read)
        if error == "stale_block":
            require(copy.key.link in self.torn, "a leased block was reused")
        self.perform(node, node.intake.copied(copy.number, error, now=self.now))

    def check_piece(self, piece: Piece, before: int, after: int, read: bytes) -> str:
        """What a transport's reader does after the copy."""
        if not (before == after == piece.generation and before % 2 == 0):
            return "stale_block"
        if piece.digest and read != piece.digest:
            return "digest_mismatch"
        return ""

    def landing(self, node: Node) -> set[int]:
        return {p.block for n, c, _ in self.copies.values() if n is node for p in c.pieces}

    def check_untouched(self, node: Node, block: int) -> None:
        """A freed block is in no copy of a peer whose link this node has not torn down."""
        for _, copy, _ in self.copies.values():
            link = copy.key.link
            if link not in self.torn and self.ends[link][0] is node:
                require(
                    all(piece.slot != block for piece in copy.pieces),
                    "freed a block that the peer is reading",
                )

    def room_changed(self, node: Node) -> None:
        node.room = True

    # Requests: the prefill role and the gateway in miniature

    def on_start(self, request: Request, _: object) -> None:
        request.attempt += 1
        self.wake_clock()
        sources = [n for n in self.sources if n.alive]
        if not sources:
            self.at(2, "start", request)
            return
        node = self.rng.choice(sources)
        targets = [n for n in self.targets if n.alive and n is not node]
        if not targets:
            self.at(2, "start", request)
            return
        prefill = Prefill(request, request.attempt, node, self.rng.choice(targets), node.life)
        self.on_allocate(prefill, None)

    def on_allocate(self, prefill: Prefill, _: object) -> None:
        node = prefill.node
        if not node.alive or node.life != prefill.life:
            self.retry(prefill.request, prefill.attempt)
            return
        wanted = identities(prefill.request.token_ids, len(prefill.request.token_ids))
        full = len(prefill.request.token_ids) // BLOCK
        taken = node.pool.take(wanted, full)
        if taken is None:
            prefill.tries += 1
            if prefill.tries > 40:
                self.retry(prefill.request, prefill.attempt)
            else:
                self.at(0.5 + self.rng.random(), "allocate", prefill)
            return
        prefill.blocks, prefill.missing = taken
        prefill.offer_at = self.rng.randrange(len(wanted) + 1)
        self.on_compute(prefill, None)

    def on_compute(self, prefill: Prefill, _: object) -> None:
        """Offer when it is time; one more chunk; announce; finish."""
        node, request = prefill.node, prefill.request
        if not node.alive or node.life != prefill.life:
            return
        if prefill.over:
            self.let_go(prefill)
            return
        wanted = identities(request.token_ids, len(request.token_ids))
        if prefill.key is None and prefill.computed >= prefill.offer_at:
            link = self.link(node, prefill.target)
            if link is None:
                prefill.over = True
                self.let_go(prefill)
                self.retry(request, prefill.attempt)
                return
            prefill.key = Key(link, request.name, prefill.attempt, 0)
            self.prefills[prefill.key] = prefill
            offer = offer_of(link, request.name, prefill.attempt, request.token_ids)
            self.perform(node, node.handoff.offer(offer, now=self.now))
            self.announce(prefill, 0, prefill.computed)
        if prefill.over:
            self.let_go(prefill)
            return
        if prefill.computed == len(wanted):
            assert prefill.key is not None
            effects = node.handoff.finished(
                prefill.key, position=len(request.token_ids), first_token=7, logprobs=None,
                now=self.now,
            )  # fmt: skip
            self.perform(node, effects)
            self.let_go(prefill)
            return
        end = min(len(wanted), prefill.computed + self.rng.randrange(1, 4))
        full = len(request.token_ids) // BLOCK
        for index in range(prefill.computed, end):
            if index in prefill.missing:
                node.pool.seal(prefill.blocks[index], wanted[index], index < full)
        start, prefill.computed = prefill.computed, end
        if prefill.key is not None:
            self.announce(prefill, start, end)
        self.at(self.rng.random() * 0.5, "compute", prefill)

    def announce(self, prefill: Prefill, start: int, end: int) -> None:
        pool, key = prefill.node.pool, prefill.key
        assert key is not None
        blocks = [
            ReadyBlock(i, prefill.blocks[i], pool.generation[prefill.blocks[i]],
                       pool.content[prefill.blocks[i]] if self.digests else b"")
            for i in range(start, end)
        ]  # fmt: skip
        if blocks:
            self.perform(prefill.node, prefill.node.handoff.ready(key, blocks, now=self.now))

    def let_go(self, prefill: Prefill) -> None:
        """The prefill sequence is over: its own references go; leases keep theirs."""
        if not prefill.released:
            prefill.released = True
            prefill.node.pool.release(prefill.blocks)
            self.perform(prefill.node, [])

    def link(self, source: Node, target: Node) -> str | None:
        if not target.alive:
            return None
        link = source.links.get(target)
        if link is None:
            self.link_count += 1
            link = f"l{self.link_count}"
            self.ends[link] = (source, target)
            source.links[target] = link
            source.open.add(link)
            target.open.add(link)
            target.intake.open_link(link, self.settings.credits)
            source.handoff.open_link(link, self.settings.credits)
        return link

    def handoff_ended(self, node: Node, ended: Ended) -> None:
        require(ended.key not in self.outcomes, "a handoff ended twice")
        self.outcomes[ended.key] = ended.outcome
        prefill = self.prefills[ended.key]
        prefill.over = True
        if ended.outcome is not Outcome.ADOPTED:
            require(
                ended.key not in self.adoptions or ended.outcome is Outcome.LINK_LOST,
                f"adopted there, {ended.outcome.value} here",
            )
            self.retry(prefill.request, prefill.attempt)
        else:
            require(ended.key in self.adoptions, "acknowledged but not adopted")

    def retry(self, request: Request, attempt: int) -> None:
        """The gateway: only the end of the newest attempt leads to another one."""
        if attempt < request.attempt or attempt in request.retried:
            return
        request.retried.add(attempt)
        if attempt < self.attempts:
            self.at(0.2 + self.rng.random(), "start", request)

    def adopted(self, node: Node, adopted: Adopted) -> None:
        require(adopted.key not in self.adoptions, "adopted twice")
        self.adoptions.add(adopted.key)
        offer = adopted.offer
        for block, identity in zip(
            adopted.reservation.blocks, identities(offer.token_ids, offer.prompt_len), strict=True
        ):
            require(node.pool.content[block] == identity, "an adopted block has wrong content")
        self.at(self.rng.random() * 2, "decoded", (node, node.life), adopted)

    def on_decoded(self, where: tuple[Node, int], adopted: Adopted) -> None:
        node, life = where
        if node.alive and node.life == life:
            offer = adopted.offer
            for block, identity in zip(
                adopted.reservation.blocks,
                identities(offer.token_ids, offer.prompt_len),
                strict=True,
            ):
                require(node.pool.content[block] == identity, "a block changed while decoding")
            node.pool.release(list(adopted.reservation.blocks))
            self.perform(node, [])

    # Quiescence

    def check_quiet(self) -> None:
        for node in self.nodes:
            if not node.alive:
                continue
            require(not node.handoff.states(), f"handoffs left: {node.handoff.states()}")
            require(not node.intake.states(), f"intakes left: {node.intake.states()}")
            require(not any(node.leases.count().values()), f"leases left: {node.leases.count()}")
            require(not node.pool.reservations, "reservations left")
            require(node.pool.free() == node.pool.size, "blocks left in use")
        for key, prefill in self.prefills.items():
            if prefill.node.life == prefill.life and prefill.node.alive:
                require(key in self.outcomes, f"{key} never ended")
