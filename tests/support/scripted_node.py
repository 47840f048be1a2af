"""A node for tests of roles: a real engine, a transfer layer that does what the test says, no sockets.

Owns what a role uses of a node (`common.node.ports.NodeServices`); what a role says
and asks for is noted. The fixtures are for the folders of the roles' tests, which name them in their
conftest.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest

from common.engine import Engine
from common.engine.core.step import Chunk, Step
from common.node.peers import Peers
from common.node.step_times import StepTimes
from common.node.steps import Steps
from common.node.suspects import Suspects
from common.store.queue import Entry
from common.store.registry import NodeRecord, NodeState, Role, Snapshot
from common.wire.message import HandoffKey, Message
from common.wire.messages import Failed, Offer, TokenRun
from kv_transfer.link import HandoffListener
from kv_transfer.ports import Ended, Granted, Outcome
from tests.support.engines import poisoned_engine


class Transfer:
    """As `Links`: notes what is offered, and ends it when the test says so. What is asked of a handoff
    that has ended does nothing."""

    def __init__(self) -> None:
        self.offers: list[Offer] = []
        self.announced: list[Any] = []  # indexes of blocks (as `ready_blocks` says), in order
        self.committed: list[HandoffKey] = []
        self.next_tokens: list[tuple[int, int]] = []  # position and token of each commit
        self.draft_positions: list[int] = []  # of each commit
        self.cancelled: list[HandoffKey] = []
        self.granted: set[HandoffKey] = set()
        self.ended: list[Ended] = []  # what the next call finds out
        self.listeners: dict[HandoffKey, HandoffListener] = {}
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
        if key in self.listeners:
            self.announced += blocks
            self._find_out()

    def commit(
        self, key: HandoffKey, *, position: int, first_token: int, draft_positions: int, **_: Any
    ) -> None:
        if key in self.listeners:
            self.committed.append(key)
            self.next_tokens.append((position, first_token))
            self.draft_positions.append(draft_positions)
            self._find_out()

    def cancel(self, key: HandoffKey, reason: str) -> None:
        if key in self.listeners:
            self.cancelled.append(key)
            self._find_out()

    def intakes(self) -> set[HandoffKey]:
        return set()

    def room_changed(self) -> None: ...

    def refuse(self, wanted: Callable[[Offer], bool], reason: str) -> None: ...

    def tell(self, effect: Granted | Ended) -> None:
        """News of a handoff, to whoever asked for it; of one that has ended nobody hears. What is
        adopted was granted before."""
        key = effect.key
        if isinstance(effect, Granted):
            self.granted.add(key)
            self.listeners[key](effect)
            return
        if effect.outcome is Outcome.ADOPTED and key not in self.granted and key not in self.cancelled:
            self.tell(Granted(key, ()))
        self.listeners.pop(key)(effect)

    def _find_out(self) -> None:
        ended, self.ended = self.ended, []
        for effect in ended:
            self.tell(effect)


class ScriptedNode:
    """`NodeServices` of a role, which is made with it and then run by it (`run_role`)."""

    incarnation = "self"
    state = NodeState.READY
    role: Any
    steps: Steps

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.kv: Any = self
        self.links: Any = Transfer()
        self.gateways: Any = Said()
        self.peers = Peers(self.incarnation, Role.DECODE, engine.fingerprint)
        self.suspects = Suspects()
        self.deleted: list[Entry] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.sealed: list[Chunk] = []
        self.alone: list[str] = []  # whose steps of their own were announced, "" between them
        self._records: dict[str, NodeRecord] = {}

    def run_role(self, role: Any, stall_limit_s: float = 60.0, times: StepTimes | None = None) -> None:
        self.role = role
        self.steps = Steps(
            self,
            role,
            stall_limit_s=stall_limit_s,
            say_alone=self._say_alone,
            room_changed=lambda: None,
            times=times,
        )

    async def _say_alone(self, alone: str) -> None:
        self.alone.append(alone)

    @property
    def said(self) -> list[Message]:
        return self.gateways.said  # type: ignore[no-any-return]

    @property
    def runs(self) -> list[TokenRun]:
        return self.gateways.runs  # type: ignore[no-any-return]

    # `NodeKV`.

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

    def go_on_writing(self, *_: object) -> None: ...

    # The node.

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

    def done(self, entry: Entry) -> None:
        self.deleted.append(entry)

    def wake(self) -> None:
        if hasattr(self, "steps"):
            self.steps.wake()

    def decode_nodes(self, *names: str, **fields: Any) -> None:
        """These are all there are, by their records."""
        self._records = {}
        for name in names:
            self.another_decode_node(name, **fields)
        self.peers.read(Snapshot(self._records, {}, ""))

    def another_decode_node(self, name: str, **fields: Any) -> None:
        """There is this one too, which computes what this node does unless its record says other."""
        mine = dataclasses.asdict(self.engine.fingerprint)
        room = {"free_blocks": 100, "max_num_seqs": 8}
        self._records[name] = NodeRecord(name, name, Role.DECODE, NodeState.READY, **(mine | room | fields))
        self.peers.read(Snapshot(self._records, {}, ""))


class Said:
    """As `Gateways`: what they were told."""

    def __init__(self) -> None:
        self.tokens = self
        self.said: list[Message] = []
        self.runs: list[TokenRun] = []

    def send(self, gateway: str, message: Message) -> None:
        self.said.append(message)

    end = send

    def fail(self, gateway: str, key: Any, error: Any, *, retryable: bool) -> None:
        self.said.append(Failed("p", *key, error.code, str(error), retryable))

    def push(self, runs: Sequence[tuple[str, TokenRun]]) -> None:
        self.runs += [run for _, run in runs]

    def stage(self, *_: object) -> None: ...


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
