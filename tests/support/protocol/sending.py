"""What a model node sends: the sender that serves (common/node/sender.py), over a model of the rest.

Owns what stands in for the engine, the links and the role of the sending node. Links open, and timers
end, when the schedule says so.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

from common.errors import LinkLost
from common.node.attempt import Attempt
from common.node.departure import ENDED_HERE, HOLDING, STANDING, Event, State
from common.node.sender import Departure, Sender
from common.wire.message import HandoffKey
from common.wire.messages import Offer
from kv_transfer.ports import ReadyBlock
from tests.support.asked import a_request
from tests.support.protocol.model import BLOCK, PARAMS, identities, require

if TYPE_CHECKING:
    from tests.support.protocol.driver import Driver, Node

FIRST_TOKEN = 7
P, M = False, True  # a prompt that is computed; a running sequence that moves (`Work.moves`)


@dataclasses.dataclass(eq=False)
class Work:
    """One choice on the sending node, and its sequence: a prompt that is computed there, or a running
    sequence that is to move."""

    request: str
    attempt: int
    prompt: tuple[int, ...]
    node: Node
    target: Node
    life: int
    moves: bool = False
    tries: int = 2  # how often it may be offered, or a link be opened for it
    block_table: list[int] = dataclasses.field(default_factory=list)
    missing: list[int] = dataclasses.field(default_factory=list)
    num_blocks: int = 0  # computed ones
    offer_at: int = 0
    status: str = "running"
    waits: int = 0  # for room on the sending node
    departure: Departure = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        request = a_request(self.prompt, PARAMS, self.request, gateway="gateway")
        attempt = Attempt(request, self.attempt, None, set(), False, began=0.0)
        self.departure = Departure(attempt, cast(Any, self), len(self.prompt), began=0.0)

    # As a sequence.

    choice = 0
    num_draft_computed = 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (*self.prompt, FIRST_TOKEN)

    @property
    def prompt_len(self) -> int:
        return len(self.prompt)

    @property
    def num_computed(self) -> int:
        return min(self.num_blocks * BLOCK, len(self.prompt))

    def hashes(self, count: int, block_size: int) -> tuple[bytes, ...]:
        return identities(self.prompt)[:count]

    @property
    def is_over(self) -> bool:
        return self.departure.state is State.OVER

    def check(self) -> None:
        """Its blocks are where the state of its departure says."""
        departure = self.departure
        state = departure.state
        require(bool(departure.held) == (state in HOLDING), f"{state.value}, but holds {departure.held}")
        require((self.status == "paused") == (state in STANDING), f"{state.value}, but {self.status}")
        if state in ENDED_HERE:
            require(self.status == "ended", f"{state.value}, but {self.status}")
        require(bool(self.block_table) == (self.status != "ended"), f"{self.status}: {self.block_table}")
        require((departure.timer is not None) == (state is State.PAUSED), "waits for a grant for ever")


class Services:
    """`NodeServices` of a model node: the engine, links and all that a sender uses."""

    block_size = BLOCK

    def __init__(self, driver: Driver, node: Node) -> None:
        self.driver, self.node = driver, node

    @property
    def engine(self) -> Services:
        return self

    kv = links = gateways = scheduler = layout = engine

    @property
    def pool(self) -> Any:
        return self.node.pool

    def wake(self) -> None: ...

    def end(self, gateway: str, word: object) -> None: ...

    # The engine.

    def finish(self, work: Work, reason: object) -> list[int]:
        require(work.status != "ended", "a sequence ended twice")
        blocks, work.block_table, work.status = work.block_table, [], "ended"
        return blocks

    def abort(self, work: Work) -> None:
        """Its sequence ends, and gives back what it has."""
        if work.status != "ended":
            self.node.pool.release(self.finish(work, None))

    def pause(self, work: Work) -> None:
        require(work.status == "running", f"pauses while {work.status}")
        work.status = "paused"

    def resume(self, work: Work) -> None:
        """It runs on: nobody else may run it, as far as this node can know."""
        require(work.status == "paused", f"runs on while {work.status}")
        key = work.departure.key
        assert key is not None
        adopted = key in self.driver.adoptions and key.link not in self.driver.torn
        require(not adopted, "a sequence runs here that another node has")
        work.status = "running"

    # The blocks.

    def go_on_writing(self, work: Work) -> None:
        """It writes into its tail."""
        if len(work.prompt) % BLOCK:
            self.node.pool.begin_write(work.block_table[-1])

    def ready_blocks(
        self, work: Work, table: list[int], start: int, end: int, computed: int
    ) -> list[ReadyBlock]:
        pool, wanted = self.node.pool, identities(work.prompt)
        require(end <= len(table), "announces blocks that it does not hold")
        for index in range(start, end):
            if pool.generation[table[index]] % 2:
                pool.seal(table[index], wanted[index], index < len(work.prompt) // BLOCK)
        return [
            ReadyBlock(index, slot, pool.generation[slot], pool.content[slot] if self.driver.digests else b"")
            for index, slot in enumerate(table[start:end], start)
        ]

    # The links.

    def offer(self, offer: Offer, listener: Any, *, waited: float) -> None:
        if offer.key.link not in self.node.open:
            raise LinkLost("the link went down since it was opened")
        (departure,) = listener.args
        self.driver.handoffs[offer.key] = of(departure)
        self.perform(self.node.handoff.offer(offer, now=self.driver.now))

    def announce(self, key: HandoffKey, blocks: list[ReadyBlock]) -> None:
        self.perform(self.node.handoff.ready(key, blocks, now=self.driver.now))

    def commit(self, key: HandoffKey, **of: Any) -> None:
        self.perform(self.node.handoff.finished(key, now=self.driver.now, **of))

    def cancel(self, key: HandoffKey, reason: str) -> None:
        self.perform(self.node.handoff.cancel(key, reason, now=self.driver.now))

    def perform(self, effects: list[Any]) -> None:
        self.driver.perform(self.node, effects)


def no_time() -> float:
    return 0.0


class Timer:
    """Until a grant; it is the departure's as long as it runs."""

    def cancel(self) -> None: ...


TIMER = Timer()


class ModelSender(Sender):
    """Of one node. The driver is its role."""

    def __init__(self, driver: Driver, node: Node) -> None:
        super().__init__(cast(Any, Services(driver, node)), cast(Any, Role(driver)), no_time)

    def _open_link(self, departure: Departure) -> None:
        self._owner.driver.link_wanted(of(departure))  # type: ignore[attr-defined]

    def abort(self, work: Work) -> None:
        cast(Services, self._node).abort(work)

    def opened(self, departure: Departure, link: str | None) -> None:
        """As `_open` ends: the link, or none."""
        if link is None:
            self._not_taken(departure, Event.NOT_OPENED)
        else:
            departure.link = link
            self.take(departure, Event.OPENED)


class Role:
    """`Owner`: a role in miniature. A node that does not take a choice is asked again, a few times; then
    a prompt is given up, and a running sequence goes on here."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def choose(self, departure: Departure) -> tuple[str, str] | None:
        work = of(departure)
        if not work.tries:
            return None
        work.tries -= 1
        return work.target.name, ""

    def linked(self, departure: Departure) -> None:
        work = of(departure)
        if work.moves:
            self.driver.may_act(work)
        else:
            work.node.sender.offer(departure)

    def await_grant(self, departure: Departure) -> None:
        departure.timer = cast(Any, TIMER)
        self.driver.waits_for_grant(of(departure))

    def granted(self, departure: Departure) -> None: ...

    def adopted(self, departure: Departure) -> None: ...

    def refused(self, departure: Departure) -> None:
        self.driver.may_act(of(departure))

    def spoiled(self, departure: Departure) -> None:
        work = of(departure)
        work.node.sender.abort(work)
        work.node.sender.cancel(departure, "spoiled")

    def over(self, departure: Departure) -> None:
        self.driver.work_over(of(departure))


def of(departure: Departure) -> Work:
    return cast(Work, departure.sequence)
