"""A node for tests of roles: a real engine, a transfer layer that does what the test says, no sockets.

Owns what a role uses of `common.node.runtime.Node` and of `kv_transfer.link.Links`; what a role says
and asks for is noted. The fixtures are for the folders of the roles' tests, which name them in their
conftest.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest

from common.engine import Engine
from common.engine.core.step import Chunk, Step
from common.messages import Failed, HandoffKey, Message, Offer, TokenRun
from common.node.runtime import Node
from common.node.steps import Steps
from common.queue import Entry
from common.registry import NodeRecord, NodeState, Role, Snapshot
from kv_transfer.link import HandoffListener
from kv_transfer.ports import Ended, Granted, Outcome
from tests.support.engines import poisoned_engine


class Transfer:
    """As `Links`: notes what is offered, and ends it when the test says so."""

    def __init__(self) -> None:
        self.offers: list[Offer] = []
        self.announced: list[Any] = []  # indexes of blocks (as `ready_blocks` says), in order
        self.committed: list[HandoffKey] = []
        self.next_tokens: list[tuple[int, int]] = []  # position and token of each commit
        self.cancelled: list[HandoffKey] = []
        self.ended: list[Ended] = []  # what the next call finds out
        self.listeners: dict[HandoffKey, HandoffListener] = {}
        self.role: Any
        self.unreachable: dict[str, type[BaseException]] = {}  # peer → what opening a link raises

    async def open(self, peer: str) -> str:
        if peer in self.unreachable:
            raise self.unreachable[peer]("nobody there")
        return f"link-{peer}"

    def offer(self, offer: Offer, listener: HandoffListener, *, waited: float = 0.0) -> None:
        self.offers.append(offer)
        self.listeners[offer.key] = listener
        self._find_out()

    def announce(self, key: HandoffKey, blocks: list[int]) -> None:
        self.announced += blocks
        self._find_out()

    def commit(self, key: HandoffKey, *, position: int, first_token: int, **_: Any) -> None:
        self.committed.append(key)
        self.next_tokens.append((position, first_token))
        self._find_out()

    def cancel(self, key: HandoffKey, reason: str) -> None:
        self.cancelled.append(key)
        self._find_out()

    def intakes(self) -> set[HandoffKey]:
        return set()

    def room_changed(self) -> None: ...

    def refuse(self, wanted: Callable[[Offer], bool], reason: str) -> None: ...

    def tell(self, effect: Granted | Ended) -> None:
        """News of a handoff, to whoever asked for it; of one that has ended nobody hears."""
        if isinstance(effect, Ended):
            self.listeners.pop(effect.key)(effect)
        else:
            self.listeners[effect.key](effect)

    def _find_out(self) -> None:
        ended, self.ended = self.ended, []
        for effect in ended:
            self.tell(effect)


class ScriptedNode:
    """Give it to a role, and the role to its `links`."""

    incarnation = "self"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.kv: Any = self
        self.links = Transfer()
        self.said: list[Message] = []
        self.runs: list[TokenRun] = []
        self.deleted: list[Entry] = []
        self.peers = Snapshot({}, {}, "")
        self.tasks: list[asyncio.Task[None]] = []
        self.lost: set[str] = set()
        self.sealed: list[Chunk] = []
        self.steps = Steps(self, 60.0)  # type: ignore[arg-type]
        self.redis: Any = None
        self.alone: list[str] = []  # whose steps of their own were announced, "" between them

    def room_changed(self) -> None: ...

    async def say_alone(self) -> None:
        self.alone.append(self.steps.alone)

    @property
    def role(self) -> Any:
        return self.links.role

    def is_lost(self, peer: str) -> bool:
        return peer in self.lost

    def ready_blocks(
        self, sequence: object, table: list[int], start: int, end: int, computed: int
    ) -> list[int]:
        return list(range(start, end))

    def unsealed(self, *_: object) -> list[Chunk]:
        return []

    def seals(self, chunk: Chunk) -> list[Chunk]:
        return [chunk]

    def seal(self, chunks: list[Chunk]) -> None:
        self.sealed += chunks

    when_filled = Node.when_filled

    def go_on_writing(self, *_: object) -> None: ...

    def is_alike(self, record: NodeRecord) -> bool:
        return record.model == ""

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(coroutine))

    async def opened(self) -> None:
        """Everything that was spawned has ended."""
        while self.tasks:
            tasks, self.tasks = self.tasks, []
            await asyncio.gather(*tasks)

    async def step(self, role: Any) -> None:
        """One step of the engine, with its links opened meanwhile."""
        self.end_step(role, await self.begin_step(role))
        await self.opened()

    async def begin_step(self, role: Any) -> Step:
        """A step that has begun and is not computed yet; its links are open."""
        step = self.engine.plan()
        assert step is not None
        role.step_begins(step)
        await self.opened()
        return step

    def end_step(self, role: Any, step: Step) -> None:
        """Compute it; the role does what it does at its end."""
        result = self.engine.runner.submit(step.input).result()
        role.step_ended(step, self.engine.commit(step, result))

    def connect(self, peer: str, endpoint: str) -> None: ...

    def send(self, gateway: str, message: Message) -> None:
        self.said.append(message)

    ended = send

    def failed(self, gateway: str, key: Any, error: Any, *, retryable: bool) -> None:
        self.said.append(Failed("p", *key, error.code, str(error), retryable))

    def done(self, entry: Entry) -> None:
        self.deleted.append(entry)

    def push_tokens(self, runs: Sequence[tuple[str, TokenRun]]) -> None:
        self.runs += [run for _, run in runs]

    def stage(self, *_: object) -> None: ...

    def prompt_begins(self, *_: object) -> None: ...

    def wake(self) -> None: ...

    def decode_nodes(self, *names: str, **fields: Any) -> None:
        """These are all there are, by their records."""
        room = {"free_blocks": 100, "max_num_seqs": 8} | fields
        size = self.engine.layout.block_size
        records = {
            n: NodeRecord(n, n, Role.DECODE, NodeState.READY, block_size=size, **room)
            for n in names
        }
        self.peers = Snapshot(records, dict.fromkeys(names, 0.0), "")


def key(peer: str, choice: int = 0, request: str = "r-1", ask: int = 1) -> HandoffKey:
    """Of a first attempt, on the link with this peer."""
    return HandoffKey(f"link-{peer}", request, 1, choice, ask)


def ended(peer: str, outcome: Outcome, reason: str = "", choice: int = 0, ask: int = 1) -> Ended:
    return Ended(key(peer, choice, ask=ask), True, outcome, reason)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return poisoned_engine()


@pytest.fixture
def node(engine: Engine) -> Iterator[ScriptedNode]:
    """Give it a role; afterwards its engine holds nothing."""
    node = ScriptedNode(engine)
    yield node
    engine.check_idle()
