"""A dispatcher and nodes' queues on a real Redis, in one process; the test decides what happens.

Everything that moves ownership is the real code: `Dispatcher`, `RecordStore`, `NodeQueue`,
`move_unread`, `Registry`, `Reaper`. What stands between them is scripted: a node computes when it is
told to, messages go by call, a link breaks when the test says so, and an answer of Redis can be lost
after the command has run.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from common.errors import NotHeld, ServiceUnavailable
from common.metrics import Metrics
from common.sampling import SamplingParams
from common.settings.config import RedisSettings
from common.store.client import RedisClient, text
from common.store.queue import Entry, NodeQueue, move_unread
from common.store.reaper import Reaper
from common.store.records import GROUP
from common.store.registry import NodeRecord, NodeState, Registry, Role
from common.store.requests import Load, Requests
from common.wire.message import Message
from common.wire.messages import Cancel, Dispatch, Failed, HoldsQuery, Stage, TokenRun, Tokens, TookOver
from gateway.dispatch import Dispatcher
from gateway.metrics import GatewayMetrics
from gateway.open_request import Work
from gateway.placement import DispatchLimits
from gateway.ports import NodeView
from gateway.prefix_index import PrefixIndex
from gateway.record_store import RecordStore
from gateway.router import LeastLoadedRouter
from tests.support.asked import a_request
from tests.support.fake_cluster import FINGERPRINT, MODEL, endless
from tests.support.redis import HANGS_S

GATEWAY = "gateway-1"
PROMPT = (1, 2, 3)
TOKENS = 4
END_LIMIT_S = HANGS_S


class LossyClient(RedisClient):
    """Runs what it is told, and then loses as many answers as the test wants."""

    answers_to_lose = 0

    async def _guarded(self, operation: Callable[[], Awaitable[Any]], retry: bool) -> Any:
        result = await super()._guarded(operation, retry)
        if self.answers_to_lose:
            self.answers_to_lose -= 1
            raise ServiceUnavailable("the answer was lost")
        return result


@dataclasses.dataclass(slots=True, eq=False)
class Held:
    """One choice of an attempt at a node. `entry` is None where it came by a handoff, at `since`."""

    dispatch: Dispatch
    choice: int
    entry: Entry | None = None
    since: int = 0
    begun: bool = False  # a prefill node has sent the first token

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.dispatch.request.id, self.dispatch.attempt, self.choice)


class ScriptedNode:
    """One incarnation. It holds what it has claimed, or was handed; it speaks when the test says so."""

    def __init__(self, name: str, role: Role, client: LossyClient) -> None:
        self.name, self.role = name, role
        self.client = client
        self.queue = NodeQueue(client, name)
        self.held: list[Held] = []
        self.words: list[TookOver] = []  # not said yet
        self.linked = True  # the gateway hears it

    def drop(self, gone: Sequence[Held]) -> list[Entry]:
        """Hold these no more; the entries of which nothing is left."""
        self.held = [held for held in self.held if held not in gone]
        kept = [held.entry for held in self.held]
        return list({h.entry.id: h.entry for h in gone if h.entry and h.entry not in kept}.values())


class World:
    """Use `async with`. Implements the gateway's `NodeBus` and `NodeDirectory`."""

    endpoint = "scripted://gateway"

    strays_interval_s = NodeQueue.strays_interval_s

    def __init__(self, url: str, *, limits: DispatchLimits | None = None, **settings: Any) -> None:
        """`settings` are of the clients of gateway and nodes."""
        self._settings = RedisSettings(url=url, **settings)
        self._clients: list[LossyClient] = []
        self.client = RedisClient(RedisSettings(url=url))  # of the test: loses nothing
        self.gateway = self._client()
        self.requests = Requests(self.client)
        self.living: dict[str, ScriptedNode] = {}
        self.dead: list[str] = []
        self._lost: set[str] = set()
        self._roles: dict[str, Role] = {}  # of all there ever were
        self._names = 0
        self.asked: list[asyncio.Task[list[list[int]]]] = []
        self.metrics = GatewayMetrics(Metrics())
        self.dispatcher = Dispatcher(
            gateway=GATEWAY,
            store=RecordStore(Requests(self.gateway)),
            bus=self,
            directory=self,
            router=LeastLoadedRouter(PrefixIndex()),
            metrics=self.metrics,
            limits=limits or DispatchLimits(max_attempts=1000),
        )

    async def __aenter__(self) -> World:
        await self.client.command("FLUSHALL")
        await self.client.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.asked:
            task.cancel()
        await asyncio.gather(*self.asked, return_exceptions=True)
        await self.dispatcher.shut_down()
        for client in (self.client, *self._clients):
            await client.close()

    def _client(self) -> LossyClient:
        client = LossyClient(self._settings)
        self._clients.append(client)
        return client

    # ── What a test does ─────────────────────────────────────────────────────────────────────────

    async def start_node(self, role: Role = Role.UNIFIED) -> ScriptedNode:
        self._names += 1
        node = ScriptedNode(f"node-{self._names}", role, self._client())
        self._roles[node.name] = role
        node.queue.strays_interval_s = self.strays_interval_s
        await node.queue.open()
        record = NodeRecord(node.name, node.name, role, NodeState.READY)
        await Registry(node.client).announce(record)
        self.living[node.name] = node
        self.dispatcher.on_nodes_changed()
        return node

    async def ask(self, n: int = 1) -> None:
        """One more client. Its request is accepted afterwards, unless there is no way for it."""
        name = f"r-{len(self.asked)}"
        self.asked.append(asyncio.create_task(self._ask(name, n)))
        while self.dispatcher.ready(MODEL) is None and not self.asked[-1].done():
            if await self.requests.get(name) is not None:
                return

    def ask_at_once(self, count: int) -> list[asyncio.Task[list[list[int]]]]:
        """Many more clients; nothing is waited for."""
        first = len(self.asked)
        self.asked += [asyncio.create_task(self._ask(f"r-{first + i}")) for i in range(count)]
        return self.asked[first:]

    async def take(self, node: ScriptedNode, capacity: int = 2) -> None:
        """As a node does, or as far as it gets while answers are lost."""
        with contextlib.suppress(ServiceUnavailable):
            for entry in await node.queue.take(capacity):
                choices = entry.dispatch.choices
                node.held += [Held(entry.dispatch, choice, entry) for choice in choices]

    def speak(self, node: ScriptedNode) -> None:
        """Tell the gateway of everything that is held, and who has what was handed over."""
        for held in list(node.held):
            self._say(node, held)
        words, node.words = node.words, []
        for word in words:
            self._deliver(node, word)

    def _say(self, node: ScriptedNode, held: Held) -> None:
        word: Message = Stage(node.name, *held.key, "prefilling", {}, 0)
        if held.entry is None:
            word = TookOver(node.name, *held.key, held.since)
        self._deliver(node, word)
        if held.begun:
            self._deliver(node, Tokens(node.name, (_run(held, first=True),)))

    async def compute(self, node: ScriptedNode) -> None:
        """Everything that is held, to its end, or to its first token; the gateway hears it if there is
        a link, and what it has not acknowledged is kept."""
        over: list[Held] = []
        for held in list(node.held):
            if node.role is Role.PREFILL and not _ends_at_first(held):
                held.begun = True
                self._say(node, held)
            else:
                self._deliver(node, Tokens(node.name, (_run(held),)))
                over.append(held)
        if node.linked:
            with contextlib.suppress(ServiceUnavailable):
                await node.queue.done(node.drop(over))

    async def hand_over(self, node: ScriptedNode, target: ScriptedNode) -> None:
        """What a prefill node has computed, to a node that decodes."""
        gone = [held for held in node.held if held.begun] if target.role is Role.DECODE else []
        for held in gone:
            since = len(held.dispatch.request.token_ids) + 1
            moved = Held(held.dispatch, held.choice, None, since)
            if held.key not in [there.key for there in target.held]:
                target.held.append(moved)
            self._say(target, moved)
            node.words.append(TookOver(target.name, *held.key, since))
        with contextlib.suppress(ServiceUnavailable):
            await node.queue.done(node.drop(gone))

    async def pull(self, node: ScriptedNode, source: str) -> None:
        """As a node does, from one that does the same work."""
        if self._roles[source] is node.role:
            with contextlib.suppress(ServiceUnavailable):
                await move_unread(node.client, source, node.name, 2)

    async def late_pull(self, gone: str, source: str) -> None:
        """A pull that Redis serves after its node has left or died."""
        if self._roles[source] is self._roles[gone]:
            await move_unread(self.client, source, gone, 2)

    async def late_read(self, node: ScriptedNode) -> None:
        """A read that the node has given up, served after the next one."""
        stream = self.client.keys.stream(node.name)
        await self.client.command("XREADGROUP", "GROUP", GROUP, node.name, "COUNT", 2, "STREAMS", stream, ">")

    def break_link(self, node: ScriptedNode) -> None:
        """The gateway takes it for dead. It may live."""
        node.linked = False
        self._lose(node.name)

    def mend_link(self, node: ScriptedNode) -> None:
        node.linked = True
        self._lost.discard(node.name)
        self.speak(node)
        self.dispatcher.on_node_linked(node.name)

    def kill(self, node: ScriptedNode) -> None:
        """kill -9; the gateway hears of it when `notice` is called."""
        del self.living[node.name]
        self.dead.append(node.name)

    def notice(self) -> None:
        """Links to the dead break."""
        for name in self.dead:
            if name not in self._lost:
                self._lose(name)

    async def drain(self, node: ScriptedNode, target: str) -> None:
        """SIGTERM, with a grace period that is too short for what is held."""
        node.queue.stop()
        with contextlib.suppress(ServiceUnavailable):
            alike = self._roles[target] is node.role
            await node.queue.give_back(target if alike else "") or await node.queue.give_back("")
        self.kill(node)
        self.notice()
        with contextlib.suppress(ServiceUnavailable):
            await Registry(node.client).leave(node.name)

    async def look(self) -> None:
        """What a gateway does twice a second."""
        self.dispatcher.on_interval()
        self.dispatcher.on_nodes_changed()
        for _ in range(3):
            await self.client.command("PING")

    async def end(self) -> None:
        """Whatever happened: one more node of each role, and all that was asked must come to its end."""
        for client in self._clients:
            client.answers_to_lose = 0
            client.settings = dataclasses.replace(client.settings, retry_s=END_LIMIT_S)
        self.notice()
        for role in set(self._roles.values()):
            await self.start_node(role)
        for node in self.living.values():
            self.mend_link(node)
        async with asyncio.timeout(END_LIMIT_S):
            while not all(task.done() for task in self.asked):
                await self.look()
                for node in self.living.values():
                    await self.take(node, 16)
                    self.speak(node)
                    await self.compute(node)
                    for decodes in [n for n in self.living.values() if n.role is Role.DECODE][-1:]:
                        await self.hand_over(node, decodes)
            while await self.requests.open_requests(GATEWAY):
                await self.look()
        await self.dispatcher.shut_down()
        for node in list(self.living.values()):
            await self.take(node, 16)  # what was superseded meanwhile
            await node.queue.done(node.drop(node.held))

    async def left_behind(self) -> list[str]:
        """What should not be in Redis any more, once the living have left and the dead are reaped."""
        loads = await self.requests.loads([*self.living, *self.dead])
        found = [f"load of {name}: {load}" for name, load in loads.items() if load != Load()]
        for name in self.living:
            if length := await self.client.command("XLEN", self.client.keys.stream(name)):
                found.append(f"{length} entries at {name}")
            await Registry(self.client).leave(name)
        now = [0.0]
        reaper = Reaper(self.client, "reaper", clock=lambda: now[0])
        for now[0] in (0.0, 50.0, 100.0):
            await reaper.sweep()
        keys = self.client.keys
        allowed = (keys.request(""), keys.requests(), keys.schema(), keys.epoch())
        names = [text(key) for key in await self.client.command("KEYS", "*")]
        return found + [name for name in names if not name.startswith(allowed)]

    # ── NodeDirectory, NodeBus ───────────────────────────────────────────────────────────────────

    def nodes(self) -> Sequence[NodeView]:
        known = [*self.living, *(name for name in self.dead if name not in self._lost)]
        return [
            NodeView(name, self._roles[name].value, name, FINGERPRINT, 512, 64)
            for name in known
            if name not in self._lost
        ]

    def lost(self, node: str) -> bool:
        return node in self._lost

    def known(self, node: str) -> bool:
        return node in self.living or node in self.dead

    def send(self, node: str, message: Message) -> None:
        there = self.living.get(node)
        if there is None or not there.linked:
            return
        if isinstance(message, Cancel):
            mine = [
                held
                for held in there.held
                if held.key[0] == message.request
                and held.key[1] <= message.attempt
                and (not message.choices or held.choice in message.choices)
            ]
            for entry in there.drop(mine):
                there.queue.over(entry)
        elif isinstance(message, HoldsQuery):
            asyncio.get_running_loop().call_soon(self._answer, there, message)

    # ── Parts ────────────────────────────────────────────────────────────────────────────────────

    def _answer(self, node: ScriptedNode, query: HoldsQuery) -> None:
        """As node/gateways.py does."""
        here = {held.key: held for held in node.held}
        for request, attempt, choice, _ in query.choices:
            key = (request, attempt, choice)
            if key in here:
                self._say(node, here[key])
            else:
                self._deliver(node, Failed(node.name, *key, NotHeld.code, "nothing of it", True))

    async def _ask(self, name: str, n: int = 1) -> list[list[int]]:
        params = SamplingParams(max_tokens=TOKENS, seed=7)
        work = Work(a_request(PROMPT, params, name, model=MODEL), n=n)
        tokens: list[list[int]] = [[] for _ in range(n)]
        async with self.dispatcher.run(work) as request:
            async for update in request.updates():
                tokens[update.choice] += [token.token_id for token in update.tokens]
        return tokens

    def _deliver(self, node: ScriptedNode, message: Message) -> None:
        if node.linked and node.name in self.living:
            self.dispatcher.on_message(node.name, message)

    def _lose(self, name: str) -> None:
        self._lost.add(name)
        self.dispatcher.on_node_lost(name, "the test says so")


def _ends_at_first(held: Held) -> bool:
    return len(held.dispatch.request.token_ids) + 1 >= held.dispatch.request.prompt_len + TOKENS


def _run(held: Held, *, first: bool = False) -> TokenRun:
    """All tokens that a node has to send, or the first."""
    position = held.since or len(held.dispatch.request.token_ids)
    index = position - held.dispatch.request.prompt_len
    ids = endless(held.dispatch.request, held.choice)[index : index + 1 if first else TOKENS]
    return TokenRun(*held.key, position, tuple(ids), (), "" if first else "length")


def answer(n: int = 1) -> list[list[int]]:
    """What every client must get, by choice."""
    params = SamplingParams(max_tokens=TOKENS, seed=7)
    return [endless(a_request(PROMPT, params), choice)[:TOKENS] for choice in range(n)]
