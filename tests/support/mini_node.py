"""A unified node without an engine: real Redis queue, real bus, tokens from a pure function; what it
owes to gateways is kept as in any node.

As a process: `python -m tests.support.mini_node REDIS_URL BEAT_S GRACE_S PACE_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

from common.model_files import model_revision
from common.model_folder.description import describe_model
from common.node.gateways import Gateways
from common.node.token_stream import ChoiceKey
from common.settings.config import RedisSettings
from common.store.client import RedisClient
from common.store.queue import Entry, NodeQueue
from common.store.registry import NodeRecord, NodeState, Registry, Role, new_incarnation
from common.wire.bus import Bus
from common.wire.messages import Cancel, Dispatch, HoldsQuery, Stage, TokenRun, TokensAck
from tests.support.bus_key import bus_settings
from tests.support.checkpoints import STORIES
from tests.support.fake_cluster import endless

BEAT_S = 0.05
TOKENIZER = describe_model(STORIES).tokenizer_digest


class MiniNode:
    """Use `running`. `hold_at`: it stops after that many tokens of each choice, until `release`;
    `pace_s`: seconds for each token."""

    def __init__(
        self, client: RedisClient, *, hold_at: int | None = None, beat_s: float = BEAT_S, pace_s: float = 0.0
    ) -> None:
        self.incarnation = new_incarnation("mini")
        self.hold_at, self.pace_s = hold_at, pace_s
        self.acknowledged: dict[tuple[str, int, int], int] = {}
        self.cancelled: list[Cancel] = []
        self.taken: list[Dispatch] = []
        self.computing: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._client = client
        self._queue = NodeQueue(client, self.incarnation)
        self._registry = Registry(client)
        self._bus = Bus(self.incarnation, bus_settings(beat_interval_s=beat_s))
        self._gateways = Gateways(self.incarnation, self._bus)
        self._gateways.attempts = self
        self._choices: dict[ChoiceKey, Dispatch] = {}
        self._released = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[MiniNode]:
        await self._queue.open()
        await self._bus.start()
        loops = (self._announce(), self._take(), self._listen(), self._watch())
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            yield self
        finally:
            await self.die()
            await self._registry.leave(self.incarnation)

    async def die(self) -> None:
        """As after kill -9: no goodbye, and the record stays."""
        tasks = [*self._tasks, *self.computing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._gateways.close()
        await self._bus.close(goodbye=False)

    def release(self) -> None:
        self.hold_at = None
        self._released.set()

    async def _announce(self) -> None:
        for beats in range(10**6):
            await self._registry.announce(
                NodeRecord(
                    self.incarnation,
                    "mini",
                    Role.UNIFIED,
                    NodeState.READY,
                    self._bus.endpoint,
                    model="stories",
                    revision=model_revision(STORIES),
                    tokenizer=TOKENIZER,
                    block_size=16,
                    num_blocks=64,
                    max_model_len=512,
                    beats=beats,
                    open_attempts=len(self.computing),
                    unacknowledged=self._gateways.tokens.num_unacknowledged,
                )
            )
            await asyncio.sleep(BEAT_S)

    async def _take(self) -> None:
        while True:
            for entry in await self._queue.take(8, wait_s=0.5):
                dispatch = entry.dispatch
                self.taken.append(dispatch)
                key = (dispatch.request.id, dispatch.attempt)
                task = asyncio.create_task(self._compute(entry))
                self.computing[key] = task
                task.add_done_callback(lambda _, key=key: self.computing.pop(key, None))  # type: ignore[misc]

    async def _listen(self) -> None:
        while True:
            received = await self._bus.receive()
            match received.message:
                case TokensAck(acks=acks) as message:
                    self._gateways.acknowledged(received.peer, message)
                    for request, attempt, choice, below in acks:
                        self.acknowledged[request, attempt, choice] = below
                case HoldsQuery() as query:
                    self._gateways.asked(received.peer, query)
                case Cancel() as cancel:
                    self.cancelled.append(cancel)
                    self._gateways.tokens.forget(
                        cancel.gateway, cancel.request, cancel.attempt, cancel.choices
                    )
                    for (request, attempt), task in list(self.computing.items()):
                        if request == cancel.request and attempt <= cancel.attempt:
                            task.cancel()

    async def _watch(self) -> None:
        while True:
            event = await self._bus.next_event()
            if event.up:
                self._gateways.linked(event.peer)
            else:
                self._gateways.unlinked(event.peer)

    async def _compute(self, entry: Entry) -> None:
        dispatch = entry.dispatch
        keys = [ChoiceKey(dispatch.request.id, dispatch.attempt, choice) for choice in dispatch.choices]
        self._choices.update(dict.fromkeys(keys, dispatch))
        try:
            async with asyncio.TaskGroup() as group:
                for key in keys:
                    group.create_task(self._generate(dispatch, key))
        finally:
            for key in keys:
                self._choices.pop(key, None)
            await self._queue.done([entry])

    async def _generate(self, dispatch: Dispatch, key: ChoiceKey) -> None:
        gateway = dispatch.request.gateway
        if self._bus.link(gateway) is None:
            self._bus.connect(gateway, dispatch.request.gateway_endpoint)
        self._gateways.send(gateway, self._stage(key))
        ids = endless(dispatch.request, key.choice)[: dispatch.request.params.max_tokens]
        for index in range(len(dispatch.request.token_ids) - dispatch.request.prompt_len, len(ids)):
            while self.hold_at is not None and index >= self.hold_at:
                await self._released.wait()
            reason = "length" if index == len(ids) - 1 else ""
            run = TokenRun(*key, dispatch.request.prompt_len + index, (ids[index],), (), reason)
            self._gateways.tokens.push([(gateway, run)])
            await asyncio.sleep(self.pace_s)
        del self._choices[key]

    def _stage(self, key: ChoiceKey) -> Stage:
        return Stage(self.incarnation, *key, "prefilling", {"queue": 0.1}, 0)

    # What `Gateways` asks.

    def holds(self, key: ChoiceKey) -> bool:
        return key in self._choices

    def gateway_linked(self, gateway: str) -> None:
        for key, dispatch in self._choices.items():
            if dispatch.request.gateway == gateway:
                self._gateways.send(gateway, self._stage(key))

    def gateway_lost(self, gateway: str) -> None:
        for key, dispatch in self._choices.items():
            if dispatch.request.gateway == gateway and (task := self.computing.get(key[:2])) is not None:
                task.cancel()


async def _main(redis_url: str, beat_s: str, grace_s: str, pace_s: str) -> None:
    client = RedisClient(RedisSettings(url=redis_url))
    await client.open()
    node = MiniNode(client, beat_s=float(beat_s), pace_s=float(pace_s))
    node._gateways.grace_s = float(grace_s)
    async with node.running():
        print(node.incarnation, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
