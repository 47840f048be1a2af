"""Random schedules: a seeded virtual network and clock that drive nodes in both directions.

Messages are late, lost, doubled and overtake each other; links are torn and their ends learn of it
at different times; nodes die, stop and come back; copies are corrupted; anybody cancels. What must
hold is checked where it happens (driver.py) and at quiescence.
"""

from __future__ import annotations

import dataclasses
import heapq
import random
from typing import Any, cast

from common.node.departure import State
from common.wire.message import Message
from kv_transfer.ports import Adopted, Outcome, TransferSettings
from tests.support.protocol.driver import Driver, Node, Running
from tests.support.protocol.model import Pool, identities, require
from tests.support.protocol.sending import Timer, Work

SETTINGS = TransferSettings(
    credits=3, repeat=1.0, answer=12.0, patience=4.0, quiet=3.0, remembered=64, copy_blocks=2
)
GIVE_UP = 400.0  # virtual seconds after which a world that still has work is stuck


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
    drain: float = 0.0
    refuse: float = 0.0  # a link that is to be opened


FAULTS = {
    "none": Faults(),
    "lossy": Faults(loss=0.1, duplicate=0.1),
    "torn": Faults(tear=0.7, corrupt=0.02, refuse=0.1),
    "cancelled": Faults(duplicate=0.1, cancel=1.0, refuse=0.1),
    "all": Faults(
        loss=0.05,
        duplicate=0.1,
        corrupt=0.01,
        tear=0.3,
        death=0.3,
        stop=0.3,
        cancel=0.5,
        drain=0.1,
        refuse=0.05,
    ),
}


@dataclasses.dataclass(eq=False)
class Request:
    name: str
    token_ids: tuple[int, ...]
    attempt: int = 0
    retried: set[int] = dataclasses.field(default_factory=set)


class World(Driver):
    """Nodes, requests, links and a heap of what happens next."""

    def __init__(
        self,
        seed: int,
        faults: Faults,
        *,
        nodes: int = 3,
        requests: int = 3,
        pool: int = 5,
        longest: int = 7,
        attempts: int = 3,
        both_ways: bool = True,
        digests: bool = True,
        moving: float = 0.3,
        settings: TransferSettings = SETTINGS,
    ) -> None:
        super().__init__(settings, digests=digests)
        rng = self.rng = random.Random(seed)
        self.faults, self.attempts, self.moving = faults, attempts, moving
        self.stayed: set[str] = set()  # requests that were to move, and ran to their end here
        self.heap: list[tuple[float, int, str, Any, Any]] = []
        self.count = 0
        self.link_count = 0
        self.ticking = False
        self.steps = 0
        self.nodes = [Node(f"n{i}", self, pool) for i in range(nodes)]
        half = max(1, nodes // 2)
        self.sources = self.nodes if both_ways else self.nodes[:half]
        self.targets = self.nodes if both_ways else self.nodes[half:]
        self.requests: dict[str, Request] = {}
        for i in range(requests):
            shared = rng.randrange(0, longest)
            tokens = tuple(range(shared)) + tuple(
                100 * rng.randrange(3) + j for j in range(shared, rng.randrange(shared, longest) + 1)
            )
            request = self.requests[f"r{i}"] = Request(f"r{i}", tokens or (1,))
            self.at(rng.random() * 3, "start", request)
        if rng.random() < faults.tear:
            for _ in range(rng.randrange(1, 3)):
                self.at(rng.random() * 8, "tear_some")
        if rng.random() < faults.death:
            self.at(rng.random() * 8, "die", rng.choice(self.nodes))
        if rng.random() < faults.stop:
            self.at(rng.random() * 8, "stop", rng.choice(self.nodes))
        if rng.random() < faults.cancel:
            for _ in range(rng.randrange(1, 4)):
                self.at(rng.random() * 8, "cancel_some")
        if rng.random() < faults.drain:
            self.at(rng.random() * 8, "drain_some", rng.choice(self.nodes))

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
                self.tick(node)
        if any(node.handoff.states() or node.intake.states() for node in self.nodes if node.alive):
            self.wake_clock()

    def until_running(self, node: Node) -> float:
        """How long a node is stopped yet; 0 for one that runs."""
        left = node.stopped_until - self.now
        return left + self.rng.random() / 100 if left > 0 else 0.0

    # Faults

    def on_die(self, node: Node, _: object) -> None:
        """The node and all it knew is gone; peers notice later; a new life begins after that."""
        if not node.alive:
            return
        node.alive = False
        for link in [link for link, ends in self.ends.items() if node in ends]:
            source, target = self.ends[link]
            if source is node:
                self.torn.add(link)
            peer = target if source is node else source
            self.at(0.5 + self.rng.random() * 3, "notice", peer, link)
        self.at(5, "revive", node)

    def on_revive(self, node: Node, _: object) -> None:
        life = node.life + 1
        node.__post_init__()
        node.life, node.alive = life, True
        for request in self.requests.values():  # the gateway retries what was on it
            if request.attempt and self.is_lost(request):
                self.retry(request, request.attempt)

    def is_lost(self, request: Request) -> bool:
        return not any(
            work.request == request.name and work.attempt == request.attempt and not work.is_over
            for work in self.works
            if work.node.alive and work.node.life == work.life
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
        if later := self.until_running(node):
            self.at(later, "notice", node, link)
        else:
            self.notice(node, link)

    def on_cancel_some(self, _a: object, _b: object) -> None:
        if not self.works:
            return
        work = self.rng.choice(self.works)
        if self.rng.random() < 0.5:
            if self.is_here(work):
                self.end(work)
                self.at(self.rng.random() * 0.3, "late", work)
        elif work.departure.key is not None and work.target.alive:
            effects = work.target.intake.cancel(work.departure.key, "cancelled", now=self.now)
            self.perform(work.target, effects)

    def on_drain_some(self, node: Node, _: object) -> None:
        if node.alive:
            self.perform(node, node.intake.drain(self.now))

    # The network, copies, decoding

    def post(self, node: Node, message: Message) -> None:
        self.wake_clock()
        rng, faults, where = self.rng, self.faults, (node, node.life)
        if faults.loss and rng.random() < faults.loss:
            return
        self.at(0.01 + rng.random() * 0.4, "deliver", where, message)
        if faults.duplicate and rng.random() < faults.duplicate:
            self.at(rng.random() * 4, "deliver", where, message)

    def on_deliver(self, where: tuple[Node, int], message: Message) -> None:
        node, life = where
        if not node.alive or node.life != life:
            return
        if later := self.until_running(node):
            self.at(later, "deliver", where, message)
        else:
            self.deliver(node, message)

    def copy_begun(self, running: Running) -> None:
        self.at(self.rng.random(), "copied", running, running.node.life)

    def on_copied(self, running: Running, life: int) -> None:
        node = running.node
        if not node.alive or node.life != life:
            self.copies.remove(running)
        elif later := self.until_running(node):
            self.at(later, "copied", running, life)
        else:
            corrupt = self.faults.corrupt
            self.end_copy(running, tuple(self.rng.random() < corrupt for _ in running.copy.pieces))

    def decodes(self, node: Node, adopted: Adopted) -> None:
        self.at(self.rng.random() * 2, "decoded", (node, node.life), adopted)

    def on_decoded(self, where: tuple[Node, int], adopted: Adopted) -> None:
        node, life = where
        if node.alive and node.life == life:
            self.decoded(node, adopted)

    def arrange(self, pool: Pool, free: list[int]) -> None:
        self.rng.shuffle(free)

    # Requests: the gateway in miniature

    def on_start(self, request: Request, _: object) -> None:
        request.attempt += 1
        self.wake_clock()
        sources = [n for n in self.sources if n.alive]
        node = self.rng.choice(sources) if sources else None
        targets = [n for n in self.targets if n.alive and n is not node]
        if node is None or not targets:
            self.at(2, "start", request)
            return
        work = Work(
            request.name,
            request.attempt,
            request.token_ids,
            node,
            self.rng.choice(targets),
            node.life,
            moves=self.rng.random() < self.moving,
            tries=self.rng.randrange(1, 4),
        )
        self.on_allocate(work, None)

    def on_allocate(self, work: Work, _: object) -> None:
        if not self.is_here(work):
            self.attempt_failed(work)
        elif self.begin(work):
            work.offer_at = self.rng.randrange(len(identities(work.prompt)) + 1)
            self.may_act(work)
        else:
            work.waits += 1
            if work.waits > 40:
                self.attempt_failed(work)
            else:
                self.at(0.5 + self.rng.random(), "allocate", work)

    def is_here(self, work: Work) -> bool:
        return work.node.alive and work.node.life == work.life

    def may_act(self, work: Work) -> None:
        self.at(self.rng.random() * 0.5, "act", work)

    def on_act(self, work: Work, _: object) -> None:
        if not self.is_here(work):
            return
        work.check()
        if later := self.until_running(work.node):
            self.at(later, "act", work)
        elif work.departure.state is State.LINKED and work.moves and self.rng.random() < 0.2:
            work.node.sender.stay(work.departure)  # preempted, and computed again
            self.may_act(work)
        elif self.act(work, self.rng.randrange(1, 4)):
            self.may_act(work)
            if self.rng.random() < 0.1:
                self.at(self.rng.random() * 2, "late", work)

    def on_late(self, work: Work, _: object) -> None:
        if self.is_here(work):
            self.say_again(work)

    def link_wanted(self, work: Work) -> None:
        self.at(self.rng.random() * 0.5, "opened", work)

    def on_opened(self, work: Work, _: object) -> None:
        if self.is_here(work):
            refused = self.rng.random() < self.faults.refuse
            work.node.sender.opened(work.departure, None if refused else self.link(work.node, work.target))

    def waits_for_grant(self, work: Work) -> None:
        work.departure.timer = timer = cast(Any, Timer())
        self.at(self.rng.random() * 3, "no_grant", work, timer)

    def on_no_grant(self, work: Work, timer: Timer) -> None:
        if not self.is_here(work) or timer is not work.departure.timer:
            return
        if later := self.until_running(work.node):
            self.at(later, "no_grant", work, timer)
        else:
            work.departure.timer = None
            work.node.sender.no_grant(work.departure)

    def work_over(self, work: Work) -> None:
        work.check()
        key = work.departure.key
        if work.moves and (key is None or self.outcomes.get(key) is not Outcome.ADOPTED):
            self.stayed.add(work.request)
        elif key is None or self.outcomes.get(key) is not Outcome.ADOPTED:
            self.attempt_failed(work)

    def link(self, source: Node, target: Node) -> str | None:
        if not target.alive:
            return None
        if target not in source.links:
            self.link_count += 1
            self.open_link(source, target, f"l{self.link_count}")
        return source.links[target]

    def attempt_failed(self, work: Work) -> None:
        self.retry(self.requests[work.request], work.attempt)

    def retry(self, request: Request, attempt: int) -> None:
        """Only the end of the newest attempt leads to another one."""
        if attempt < request.attempt or attempt in request.retried:
            return
        request.retried.add(attempt)
        if attempt < self.attempts:
            self.at(0.2 + self.rng.random(), "start", request)

    def completed(self) -> set[str]:
        """Requests that arrived somewhere whole, or ran to their end where they were."""
        return {key.request for key in self.adoptions} | self.stayed

    def all_adopted(self) -> bool:
        return set(self.outcomes.values()) == {Outcome.ADOPTED}
