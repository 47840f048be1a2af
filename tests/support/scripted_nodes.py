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

from common.config import RedisSettings
from common.errors import ServiceUnavailable
from common.messages import Cancel, Dispatch, Message, Stage, TokenRun, Tokens
from common.metrics import Metrics
from common.queue import Entry, NodeQueue, move_unread
from common.reaper import Reaper
from common.redis_client import RedisClient, text
from common.redis_scripts import GROUP
from common.registry import NodeRecord, NodeState, Registry, Role
from common.requests import Load, Requests
from common.sampling import SamplingParams
from gateway.dispatch import Dispatcher
from gateway.metrics import GatewayMetrics
from gateway.open_request import Work
from gateway.placement import Limits
from gateway.ports import UNIFIED, NodeLoad, NodeView
from gateway.prefix_index import PrefixIndex
from gateway.record_store import RecordStore
from gateway.router import LeastLoadedRouter
from tests.support.fake_cluster import FINGERPRINT, MODEL, endless

GATEWAY = "gateway-1"
PROMPT = (1, 2, 3)
TOKENS = 4
END_LIMIT_S = 20.0


class LossyClient(RedisClient):
    """Runs what it is told, and then loses as many answers as the test wants."""

    answers_to_lose = 0

    async def _guarded(self, operation: Callable[[], Awaitable[Any]], retry: bool) -> Any:
        result = await super()._guarded(operation, retry)
        if self.answers_to_lose:
            self.answers_to_lose -= 1
            raise ServiceUnavailable("the answer was lost")
        return result


class ScriptedNode:
    """One incarnation. It holds what it has claimed, and says so when the test wants it."""

    def __init__(self, name: str, client: LossyClient) -> None:
        self.name = name
        self.client = client
        self.queue = NodeQueue(client, name)
        self.held: list[Entry] = []
        self.linked = True  # the gateway hears it


class World:
    """Use `async with`. Implements the gateway's `NodeBus` and `NodeDirectory`."""

    endpoint = "scripted://gateway"

    def __init__(self, url: str, **settings: Any) -> None:
        """`settings` are of the clients of gateway and nodes."""
        self._settings = RedisSettings(url=url, **settings)
        self._clients: list[LossyClient] = []
        self.client = RedisClient(RedisSettings(url=url))  # of the test: loses nothing
        self.gateway = self._client()
        self.requests = Requests(self.client)
        self.living: dict[str, ScriptedNode] = {}
        self.dead: list[str] = []
        self._lost: set[str] = set()
        self._names = 0
        self.asked: list[asyncio.Task[list[int]]] = []
        self.metrics = GatewayMetrics(Metrics())
        self.dispatcher = Dispatcher(
            gateway=GATEWAY, store=RecordStore(Requests(self.gateway)), bus=self,
            directory=self, router=LeastLoadedRouter(PrefixIndex()), metrics=self.metrics,
            limits=Limits(max_attempts=1000),
        )  # fmt: skip

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

    async def start_node(self) -> ScriptedNode:
        self._names += 1
        node = ScriptedNode(f"node-{self._names}", self._client())
        await node.queue.open()
        record = NodeRecord(node.name, node.name, Role.UNIFIED, NodeState.READY)
        await Registry(node.client).announce(record)
        self.living[node.name] = node
        self.dispatcher.on_nodes_changed()
        return node

    async def ask(self) -> None:
        """One more client. Its request is accepted afterwards, unless there is no node for it."""
        name = f"r-{len(self.asked)}"
        self.asked.append(asyncio.create_task(self._ask(name)))
        while self.nodes() and not self.asked[-1].done():
            if await self.requests.get(name) is not None:
                return

    def ask_at_once(self, count: int) -> list[asyncio.Task[list[int]]]:
        """Many more clients; nothing is waited for."""
        first = len(self.asked)
        self.asked += [asyncio.create_task(self._ask(f"r-{first + i}")) for i in range(count)]
        return self.asked[first:]

    async def take(self, node: ScriptedNode, capacity: int = 2) -> None:
        """As a node does, or as far as it gets while answers are lost."""
        with contextlib.suppress(ServiceUnavailable):
            node.held += await node.queue.take(capacity)

    def speak(self, node: ScriptedNode) -> None:
        """Tell the gateway of everything that is held."""
        for entry in node.held:
            for choice in entry.dispatch.choices:
                key = (entry.dispatch.request, entry.dispatch.attempt, choice)
                self._deliver(node, Stage(node.name, *key, "prefilling", {}, 0))

    async def compute(self, node: ScriptedNode) -> None:
        """Everything that is held, to its end; the gateway hears it if there is a link."""
        held, node.held = node.held, []
        for entry in held:
            for choice in entry.dispatch.choices:
                self._deliver(node, Tokens(node.name, (_run(entry.dispatch, choice),)))
        with contextlib.suppress(ServiceUnavailable):
            await node.queue.done(held)
        if not node.linked:  # it keeps what nobody has acknowledged
            node.held = held

    async def pull(self, node: ScriptedNode, source: str) -> None:
        with contextlib.suppress(ServiceUnavailable):
            await move_unread(node.client, source, node.name, 2)

    async def late_pull(self, gone: str, source: str) -> None:
        """A pull that Redis serves after its node has left or died."""
        await move_unread(self.client, source, gone, 2)

    async def late_read(self, node: ScriptedNode) -> None:
        """A read that the node has given up, served after the next one."""
        stream = self.client.keys.stream(node.name)
        await self.client.command(
            "XREADGROUP", "GROUP", GROUP, node.name, "COUNT", 2, "STREAMS", stream, ">"
        )

    def break_link(self, node: ScriptedNode) -> None:
        """The gateway takes it for dead. It may live."""
        node.linked = False
        self._lose(node.name)

    def mend_link(self, node: ScriptedNode) -> None:
        node.linked = True
        self._lost.discard(node.name)
        self.speak(node)
        self.dispatcher.on_nodes_changed()

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
            await node.queue.give_back(target) or await node.queue.give_back("")
        self.kill(node)
        self.notice()
        with contextlib.suppress(ServiceUnavailable):
            await Registry(node.client).leave(node.name)

    async def look(self) -> None:
        """What a gateway does twice a second."""
        self.dispatcher.on_nodes_changed()
        for _ in range(3):
            await self.client.command("PING")

    async def end(self) -> None:
        """Whatever happened: one more node, and everything that was asked must come to its end."""
        for client in self._clients:
            client.answers_to_lose = 0
            client.settings = dataclasses.replace(client.settings, retry_s=END_LIMIT_S)
        self.notice()
        await self.start_node()
        for node in self.living.values():
            self.mend_link(node)
        async with asyncio.timeout(END_LIMIT_S):
            while not all(task.done() for task in self.asked):
                await self.look()
                for node in self.living.values():
                    await self.take(node, 16)
                    self.speak(node)
                    await self.compute(node)
            while await self.requests.open_requests(GATEWAY):
                await self.look()
        await self.dispatcher.shut_down()
        for node in list(self.living.values()):
            await self.take(node, 16)  # what was superseded meanwhile
            await node.queue.done(node.held)

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
            NodeView(name, UNIFIED, name, FINGERPRINT, 512, 64, load=NodeLoad(free_blocks=64))
            for name in known
            if name not in self._lost
        ]

    def lost(self, node: str) -> bool:
        return node in self._lost

    def known(self, node: str) -> bool:
        return node in self.living or node in self.dead

    def send(self, node: str, message: Message) -> None:
        if isinstance(message, Cancel) and (there := self.living.get(node)):
            mine = [
                entry
                for entry in there.held
                if entry.dispatch.request == message.request
                and entry.dispatch.attempt <= message.attempt
            ]
            there.held = [entry for entry in there.held if entry not in mine]
            for entry in mine:
                there.queue.over(entry)

    # ── Parts ────────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, name: str) -> list[int]:
        work = Work(name, PROMPT, SamplingParams(max_tokens=TOKENS, seed=7), MODEL)
        tokens: list[int] = []
        async with self.dispatcher.run(work) as request:
            async for update in request.updates():
                tokens += [token.token_id for token in update.tokens]
        return tokens

    def _deliver(self, node: ScriptedNode, message: Message) -> None:
        if node.linked and node.name in self.living:
            self.dispatcher.on_message(node.name, message)

    def _lose(self, name: str) -> None:
        self._lost.add(name)
        self.dispatcher.on_node_lost(name, "the test says so")


def _run(dispatch: Dispatch, choice: int) -> TokenRun:
    delivered = len(dispatch.token_ids) - dispatch.prompt_len
    ids = endless(dispatch, choice)[delivered:TOKENS]
    position = len(dispatch.token_ids)
    return TokenRun(dispatch.request, dispatch.attempt, choice, position, tuple(ids), (), "length")


def answer() -> list[int]:
    """What every client must get."""
    params = SamplingParams(max_tokens=TOKENS, seed=7)
    dispatch = Dispatch(
        "", 1, (0,), PROMPT, len(PROMPT), params, "", "", "", "", "", 0, 0, "", MODEL
    )
    return endless(dispatch, 0)[:TOKENS]
