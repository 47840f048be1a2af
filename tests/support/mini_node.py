"""A unified node without an engine: real Redis queue, real bus, tokens from a pure function."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from common.bus import Bus
from common.messages import Cancel, Dispatch, Stage, TokenRun, Tokens, TokensAck
from common.model_files import model_revision
from common.model_folder.description import describe_model
from common.queue import Entry, NodeQueue
from common.redis_client import RedisClient
from common.registry import NodeRecord, NodeState, Registry, Role, new_incarnation
from tests.support.bus_key import bus_settings
from tests.support.checkpoints import STORIES
from tests.support.fake_cluster import endless

BEAT_S = 0.05
TOKENIZER = describe_model(STORIES).tokenizer_digest


class MiniNode:
    """Use `running`. `hold_at`: it stops after that many tokens of each choice, until `release`."""

    def __init__(self, client: RedisClient, *, hold_at: int | None = None) -> None:
        self.incarnation = new_incarnation("mini")
        self.hold_at = hold_at
        self.acknowledged: dict[tuple[str, int, int], int] = {}
        self.cancelled: list[Cancel] = []
        self.taken: list[Dispatch] = []
        self.computing: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._client = client
        self._queue = NodeQueue(client, self.incarnation)
        self._registry = Registry(client)
        self._bus = Bus(self.incarnation, bus_settings(beat_interval_s=BEAT_S))
        self._released = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[MiniNode]:
        await self._queue.open()
        await self._bus.start()
        loops = (self._announce(), self._take(), self._listen())
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
        await self._bus.close(goodbye=False)

    def release(self) -> None:
        self.hold_at = None
        self._released.set()

    async def _announce(self) -> None:
        for beats in range(10**6):
            await self._registry.announce(
                NodeRecord(
                    self.incarnation, "mini", Role.UNIFIED, NodeState.READY, self._bus.endpoint,
                    model="stories", revision=model_revision(STORIES), tokenizer=TOKENIZER,
                    block_size=16, num_blocks=64, max_model_len=512, beats=beats,
                )
            )  # fmt: skip
            await asyncio.sleep(BEAT_S)

    async def _take(self) -> None:
        while True:
            for entry in await self._queue.take(8, wait_s=0.5):
                dispatch = entry.dispatch
                self.taken.append(dispatch)
                key = (dispatch.request, dispatch.attempt)
                task = asyncio.create_task(self._compute(entry))
                self.computing[key] = task
                task.add_done_callback(lambda _, key=key: self.computing.pop(key, None))  # type: ignore[misc]

    async def _listen(self) -> None:
        while True:
            received = await self._bus.receive()
            match received.message:
                case TokensAck(acks=acks):
                    for request, attempt, choice, below in acks:
                        self.acknowledged[request, attempt, choice] = below
                case Cancel() as cancel:
                    self.cancelled.append(cancel)
                    for (request, attempt), task in list(self.computing.items()):
                        if request == cancel.request and attempt <= cancel.attempt:
                            task.cancel()

    async def _compute(self, entry: Entry) -> None:
        dispatch = entry.dispatch
        try:
            async with asyncio.TaskGroup() as group:
                for choice in dispatch.choices:
                    group.create_task(self._generate(dispatch, choice))
        finally:
            await self._queue.done([entry])

    async def _generate(self, dispatch: Dispatch, choice: int) -> None:
        request, attempt, gateway = dispatch.request, dispatch.attempt, dispatch.gateway
        if self._bus.link(gateway) is None:
            self._bus.connect(gateway, dispatch.gateway_endpoint)
        stage = Stage(self.incarnation, request, attempt, choice, "prefilling", {"queue": 0.1}, 0)
        self._bus.send(gateway, stage)
        ids = endless(dispatch, choice)[: dispatch.params.max_tokens]
        for index in range(len(dispatch.token_ids) - dispatch.prompt_len, len(ids)):
            while self.hold_at is not None and index >= self.hold_at:
                await self._released.wait()
            reason = "length" if index == len(ids) - 1 else ""
            run = TokenRun(
                request, attempt, choice, dispatch.prompt_len + index, (ids[index],), (), reason
            )
            self._bus.send(gateway, Tokens(self.incarnation, (run,)))
            await asyncio.sleep(0)
